"""Images with noisy labels, on the training device: CIFAR, embedded digits or an npz file; noise, split, augmentation."""

from __future__ import annotations

import os
import pickle
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evograd.lab.data import fingerprint

DATASETS = ("digits", "cifar10", "cifar100")
NOISES = ("flip", "flip2", "unif", "hierarchical", "given")
CIFAR_MEAN = [value / 255 for value in (125.3, 123.0, 113.9)]
CIFAR_STD = [value / 255 for value in (63.0, 62.1, 66.7)]


@dataclass
class Source:
    """A data set as it is published. Images (n, c, h, w), uint8; labels (n,), int64, from 0.

    y_noisy: labels of the training images that are noisy already; with them y_train may be -1, where it is not known.
    superclasses: (classes,), the superclass of each class.
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    y_noisy: Tensor | None = None
    superclasses: Tensor | None = None
    mean: list[float] | None = None
    std: list[float] | None = None

    @property
    def n_classes(self) -> int:
        return int(max(self.y_train.max(), self.y_test.max())) + 1


@dataclass
class Split:
    """images: (n, c, h, w), uint8.  labels: (n,), what is trained on or tested against.  clean: (n,), the true ones, or -1."""

    images: Tensor
    labels: Tensor
    clean: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class Task:
    """Disjoint (train, meta, val) of the training images, and test. Labels of `train` alone are noisy.

    noise_matrix: (classes, classes), probability of the label (column) that an image of a class (row) is given; None if true
    labels are not known.
    """

    train: Split
    meta: Split
    val: Split
    test: Split
    n_classes: int
    noise_matrix: Tensor | None
    mean: Tensor
    std: Tensor

    def check_padding(self, padding: int) -> None:
        """ValueError where there are not so many pixels to reflect."""
        h, w = self.train.images.shape[2:]
        if padding >= min(h, w):
            raise ValueError(
                f"--crop-padding {padding} given; for images of {h} x {w} pixels at most {min(h, w) - 1} is accepted"
            )

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 pixels -> float32, mean 0 and standard deviation 1 for each channel."""
        return (images.float() / 255 - self.mean) / self.std

    def augmented(self, images: Tensor, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
        """Crop each image (n, c, h, w) at a place of its own after reflecting `padding` pixels around it, mirror one in two,
        normalise. One gather for the whole batch, no loop over images."""
        n, _, h, w = images.shape
        if not padding and not flip:
            return self.normalize(images)
        shift = torch.randint(-padding, padding + 1, (2, n, 1), generator=generator, device=images.device)
        rows = reflect(torch.arange(h, device=images.device) + shift[0], h)
        columns = reflect(torch.arange(w, device=images.device) + shift[1], w)
        if flip:
            mirror = torch.rand(n, 1, generator=generator, device=images.device) < 0.5
            columns = torch.where(mirror, columns.flip(1), columns)
        sample = torch.arange(n, device=images.device)[:, None, None]
        return self.normalize(images.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2))


def reflect(index: Tensor, size: int) -> Tensor:
    """Indices outside of [0, size) -> their mirror images inside; the border itself is not repeated."""
    return (size - 1) - ((size - 1) - index.abs()).abs()


def load(name: str, data_dir: str, download: bool = False) -> Source:
    """One of DATASETS, or an npz file; FileNotFoundError or ValueError that says what is missing."""
    if name == "digits":
        return _digits()
    if name in DATASETS:
        return _cifar(name, data_dir, download)
    return _npz(Path(name))


def data_fingerprint(name: str, data_dir: str) -> str | None:
    """What the record of a run says of the content of its files: names, sizes and check sums of an npz file's arrays, however they
    are packed; pixels and labels of CIFAR in other files than those published. None for embedded and for published data, and for
    what cannot be read."""
    if name == "digits":
        return None
    try:
        if name in DATASETS:
            kind = _cifar_kind(name)
            if _published(kind, Path(data_dir) / kind.base_folder):
                return None
            source = load(name, data_dir)
            return fingerprint(*(t.numpy().tobytes() for t in (source.x_train, source.y_train, source.x_test, source.y_test)))
        with zipfile.ZipFile(name) as file:
            return fingerprint(*(f"{part.filename} {part.file_size} {part.CRC}" for part in file.infolist()))
    except (OSError, ValueError, zipfile.BadZipFile):
        return None  # `load` says why


def make_task(
    source: Source,
    noise: str,
    level: float,
    n_meta: int,
    n_val: int,
    n_train: int | None,
    seed: int,
    device: torch.device | str,
) -> Task:
    """Split the training images, n_meta and n_val of them balanced over the classes, and make the labels of the rest noisy.

    Everything follows from the seed. n_train: how many of the rest are used, all if None.
    """
    _check_source(source, unknown=noise == "given" and source.y_noisy is not None)
    n_classes = source.n_classes
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(source.y_train), generator=generator)
    meta, order = _balanced(source.y_train, order, n_meta, n_classes, "--meta-images")
    val, order = _balanced(source.y_train, order, n_val, n_classes, "--val-images", f" after --meta-images {n_meta}")
    if len(order) < (n_train or 1):
        raise ValueError(
            f"--train-images {n_train or 1}, but {len(order):,} are left of {len(source.y_train):,} "
            f"after {n_meta} meta and {n_val} validation images"
        )
    rest = order[:n_train]
    clean = source.y_train[rest]
    if noise == "given":
        if source.y_noisy is None:
            raise ValueError("--noise given, but the data have no noisy labels: an npz file with an array y_noisy is needed")
        labels = source.y_noisy[rest]
    if noise == "given" and (clean < 0).any():
        matrix = None
    elif noise == "given":
        pairs = torch.bincount(clean * n_classes + labels, minlength=n_classes**2).reshape(n_classes, n_classes).double()
        matrix = pairs / pairs.sum(1, keepdim=True).clamp_min(1)
    else:
        matrix = noise_matrix(noise, level, n_classes, source.superclasses, generator)
        labels = torch.multinomial(matrix[clean], 1, generator=generator)[:, 0]

    mean, std = source.mean, source.std
    if mean is None:
        mean, std = _statistics(source.x_train[rest])
    channels = [torch.tensor(values, dtype=torch.float32, device=device)[:, None, None] for values in (mean, std)]

    def split(index, labels=None):
        truth = source.y_train[index]
        parts = (source.x_train[index], truth if labels is None else labels, truth)
        return Split(*(part.to(device) for part in parts))

    test = Split(*(part.to(device) for part in (source.x_test, source.y_test, source.y_test)))
    return Task(split(rest, labels), split(meta), split(val), test, n_classes, matrix, *channels)


def noise_matrix(noise: str, level: float, n_classes: int, superclasses: Tensor | None, generator: torch.Generator) -> Tensor:
    """(classes, classes), float64: row i is the distribution of the label of an image of class i.

    unif: with probability `level` a label drawn from all classes.  flip: one other class.  flip2: two other classes, half of
    `level` each.  hierarchical: the other classes of the same superclass. Which classes, `generator` draws.
    """
    if not 0 <= level <= 1:
        raise ValueError(f"--noise-level {level} given; a number in [0, 1] is accepted")
    matrix = torch.eye(n_classes, dtype=torch.float64) * (1 - level)
    if noise == "unif":
        return matrix + level / n_classes
    for i in range(n_classes):
        if noise == "hierarchical":
            if superclasses is None:
                raise ValueError(
                    "--noise hierarchical, but the data have no superclasses; cifar100 has, and an npz file with superclasses"
                )
            others = torch.nonzero(superclasses == superclasses[i])[:, 0]
            others = others[others != i]
            if not len(others):
                raise ValueError(f"--noise hierarchical: class {i} is alone in its superclass {int(superclasses[i])}")
        else:
            n_others = {"flip": 1, "flip2": 2}[noise]
            if n_classes <= n_others:
                others = "; two classes can have --noise flip" if n_classes == 2 else ""
                raise ValueError(f"--noise {noise} needs at least {n_others + 1} classes; the data have {n_classes}{others}")
            others = torch.randperm(n_classes - 1, generator=generator)[:n_others]
            others = others + (others >= i)
        matrix[i, others] += level / len(others)
    return matrix


def _statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """(mean, standard deviation) of each channel of uint8 images, as values in [0, 1]; exact, from the counts of 256 values."""
    values = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.stack([torch.bincount(channel.reshape(-1).int(), minlength=256) for channel in images.unbind(1)]).double()
    share = counts / counts.sum(1, keepdim=True)
    mean = share @ values
    return mean.tolist(), (share @ values**2 - mean**2).clamp_min(1e-6).sqrt().tolist()


def _balanced(labels: Tensor, order: Tensor, n: int, n_classes: int, flag: str, after: str = "") -> tuple[Tensor, Tensor]:
    """(n of the indices `order`, the same number of every class; the others). after: what has taken of them before."""
    if n % n_classes:
        raise ValueError(f"{flag} {n} given; a multiple of the number of classes, {n_classes}, is accepted")
    each = n // n_classes
    chosen = []
    for c in range(n_classes):
        mine = order[labels[order] == c]
        if len(mine) < each:
            raise ValueError(f"{flag} {n} takes {each} images of each class, but of class {c} there are {len(mine)}{after}")
        chosen.append(mine[:each])
    chosen = torch.cat(chosen)
    taken = torch.zeros(len(labels), dtype=torch.bool)
    taken[chosen] = True
    return chosen, order[~taken[order]]


def _check_source(source: Source, unknown: bool) -> None:
    """ValueError that names the array that does not fit. unknown: whether y_train may be -1."""
    for part in ("train", "test"):
        x, y = getattr(source, f"x_{part}"), getattr(source, f"y_{part}")
        if x.dim() != 4 or x.dtype != torch.uint8 or not len(x):
            raise ValueError(f"x_{part} is {tuple(x.shape)}, {x.dtype}; images (n, channels, h, w) of uint8 are accepted")
        if y.shape != (len(x),):
            raise ValueError(f"y_{part} is {tuple(y.shape)}, but x_{part} has {len(x)} images; shape ({len(x)},) is accepted")
    if source.x_train.shape[1:] != source.x_test.shape[1:]:
        train, test = tuple(source.x_train.shape[1:]), tuple(source.x_test.shape[1:])
        raise ValueError(f"x_train has images of {train}, x_test of {test}; they must be of one size")
    n_classes = int(source.y_train.max()) + 1
    for name in ("y_train", "y_test", "y_noisy"):
        y = getattr(source, name)
        if y is None:
            continue
        if y.shape != (len(source.x_test if name == "y_test" else source.x_train),):
            raise ValueError(f"{name} is {tuple(y.shape)}; one label for each image is accepted")
        if y.min() < (-1 if unknown and name == "y_train" else 0) or y.max() >= n_classes:
            raise ValueError(
                f"{name} has labels from {int(y.min())} to {int(y.max())}; "
                f"0 to {n_classes - 1} are accepted, the classes of y_train"
            )
    if not n_classes:
        raise ValueError("y_train is -1 for all images; meta and validation images need their true labels")
    missing = sorted(set(range(n_classes)) - set(source.y_train.tolist()))
    if missing:
        first = int(source.y_train[source.y_train >= 0].min())
        advice = f"; subtract {first} from all labels" if missing == list(range(first)) else "; number the classes without gaps"
        some = ", ".join(map(str, missing[:5])) + (", …" if len(missing) > 5 else "")
        raise ValueError(
            f"y_train has labels from {first} to {n_classes - 1}, but no image of class {some}; "
            f"every class from 0 to {n_classes - 1} must have some{advice}"
        )
    if source.superclasses is not None and source.superclasses.shape != (n_classes,):
        shape = tuple(source.superclasses.shape)
        raise ValueError(f"superclasses is {shape}; shape ({n_classes},) is accepted, one for each class")


def _digits() -> Source:
    """scikit-learn's 1,797 digits, 8x8; every third or so (500) is for testing, the same for every seed."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images / 16 * 255).round().to(torch.uint8).unsqueeze(1)
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))  # writers are in sequence
    train, test = order[:-500], order[-500:]
    return Source(images[train], labels[train], images[test], labels[test])


def _cifar(name: str, data_dir: str, download: bool) -> Source:
    kind = _cifar_kind(name)
    folder = Path(data_dir) / kind.base_folder
    if download and not folder.exists():
        _download_cifar(kind, Path(data_dir))
    if not folder.exists():
        raise FileNotFoundError(
            f"no {name} under {data_dir}: {folder} is missing. "
            "Name the folder with --data-dir, or add --download to fetch it into that folder"
        )
    try:
        parts = [[_cifar_entry(folder / file) for file, _ in files] for files in (kind.train_list, kind.test_list)]
        images = [torch.from_numpy(np.concatenate([entry["data"] for entry in part])) for part in parts]
        images = [pixels.reshape(-1, 3, 32, 32) for pixels in images]
        key = {"cifar10": "labels", "cifar100": "fine_labels"}[name]
        labels = [torch.tensor([int(label) for entry in part for label in entry[key]]) for part in parts]
        if not _published(kind, folder):
            _check_cifar(images, labels, int(name.removeprefix("cifar")))
        superclasses = None
        if name == "cifar100":  # of each class, as the labels of its own file pair them
            coarse = torch.tensor([int(label) for label in parts[0][0]["coarse_labels"]])
            superclasses = torch.zeros(int(labels[0].max()) + 1, dtype=torch.int64).scatter_(0, labels[0], coarse)
    except Exception as error:  # whatever unpickling and arrays of something else raise
        raise ValueError(
            f"{folder} is broken: {str(error) or type(error).__name__}. Delete or rename it and run again with --download"
        ) from error
    return Source(images[0], labels[0], images[1], labels[1], superclasses=superclasses, mean=CIFAR_MEAN, std=CIFAR_STD)


def _cifar_kind(name: str) -> type:
    from torchvision.datasets import CIFAR10, CIFAR100

    return {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]


def _published(kind: type, folder: Path) -> bool:
    """Whether the files are those that were published, by their md5 sums. Others may hold the same, written by another program."""
    from torchvision.datasets import cifar

    return all(cifar.check_integrity(folder / file, md5) for file, md5 in kind.train_list + kind.test_list)


class _Arrays(pickle.Unpickler):
    """Reads what numpy arrays, lists and strings are made of, and runs nothing else that a file asks for."""

    def find_class(self, module: str, name: str):
        if (module.split(".")[0], name) in ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs")


ALLOWED = {("numpy", name) for name in ("_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer")} | {("_codecs", "encode")}


def _cifar_entry(path: Path) -> dict:
    try:
        with open(path, "rb") as file:
            entry = _Arrays(file, encoding="latin1").load()
        return {key.decode() if isinstance(key, bytes) else key: value for key, value in entry.items()}
    except Exception as error:
        raise ValueError(f"{path.name}: {str(error) or type(error).__name__}") from error


def _check_cifar(images: list[Tensor], labels: list[Tensor], n_classes: int) -> None:
    """ValueError unless there are 50,000 and 10,000 images, as many of each class."""
    for part, x, y, n in zip(("training", "test"), images, labels, (50_000, 10_000)):
        if x.dtype != torch.uint8 or x.shape != (n, 3, 32, 32):
            raise ValueError(f"the {part} images are {tuple(x.shape)}, {x.dtype}, not ({n}, 3, 32, 32) of uint8")
        if len(y) != n or y.min() < 0 or not torch.equal(y.bincount(), torch.full((n_classes,), n // n_classes)):
            raise ValueError(f"the {part} labels are not {n // n_classes} of each of {n_classes} classes")


def _download_cifar(kind: type, root: Path) -> None:
    """Fetch into a folder of its own, which takes its place when all is there and right."""
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{kind.base_folder}.tmp", dir=root) as temporary:
        try:
            kind(temporary, download=True)
        except RuntimeError as error:  # a wrong md5 sum; what cannot be reached is an OSError
            raise OSError(f"{kind.__name__} could not be fetched into {root}: {error}") from error
        os.replace(Path(temporary) / kind.base_folder, root / kind.base_folder)


def _npz(path: Path) -> Source:
    """x_train, y_train, x_test, y_test, and if there are y_noisy and superclasses; images (n, h, w) or (n, h, w, 1 or 3)."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with open(path, "rb") as opened:
            file = np.load(opened)
            if isinstance(file, np.ndarray):
                raise ValueError("it is one array, as np.save writes it; np.savez writes several with their names")
            arrays = {}
            for name in file.files:
                try:
                    arrays[name] = file[name]
                except ValueError as error:
                    if "Object arrays" not in str(error):
                        raise
                    raise ValueError(f"{name} is an array of Python objects; arrays of numbers are accepted") from error
    except (ValueError, zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole npz file: {error}") from error
    needed = ("x_train", "y_train", "x_test", "y_test")
    missing = [name for name in needed if name not in arrays]
    if missing:
        raise ValueError(f"{path} has no {', '.join(missing)}; needed are {', '.join(needed)}, it has {', '.join(arrays)}")

    def images(name):
        x = arrays[name]
        x = x[..., None] if x.ndim == 3 else x
        if x.ndim != 4 or x.shape[-1] not in (1, 3) or x.dtype != np.uint8:
            accepted = "(n, h, w), (n, h, w, 1) or (n, h, w, 3) of uint8 are accepted"
            raise ValueError(f"{path}: {name} is {arrays[name].shape}, {arrays[name].dtype}; {accepted}")
        return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()

    def labels(name):
        if name not in arrays:
            return None
        y = arrays[name]
        if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
            raise ValueError(f"{path}: {name} is {y.shape}, {y.dtype}; one integer for each image is accepted")
        return torch.from_numpy(y.astype(np.int64))

    # In the order of the fields of Source.
    return Source(
        images("x_train"), labels("y_train"), images("x_test"), labels("y_test"), labels("y_noisy"), labels("superclasses")
    )
