"""MNIST (files) and scikit-learn's digits (embedded), as uint8 images on the training device."""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import math
import shutil
import urllib.request
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from evograd.lab.data import fingerprint
from evograd.lab.records import replacing

TRUE_ANGLE = math.radians(30)
MEAN, STD = 0.1307, 0.3081

DATASETS = ("digits", "mnist")
FILES = {  # of MNIST: name -> bytes when unpacked
    "train-images-idx3-ubyte": 16 + 60_000 * 28 * 28,
    "train-labels-idx1-ubyte": 8 + 60_000,
    "t10k-images-idx3-ubyte": 16 + 10_000 * 28 * 28,
    "t10k-labels-idx1-ubyte": 8 + 10_000,
}
PUBLISHED = {  # SHA-256 of what they hold
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
IDX = {"images-idx3-ubyte": (2051, (28, 28)), "labels-idx1-ubyte": (2049, ())}  # a file's first number, the form of an item
MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/")


@dataclass
class Split:
    """images: (n, 1, 28, 28), uint8.  labels: (n,), int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels in [0, 1] and labels. index: on the same device."""
        return self.images[index].float() / 255, self.labels[index]


def rotate(images: Tensor, angle: Tensor | float) -> Tensor:
    """Turn images (n, 1, h, w) by `angle` radians about their centre, differentiably; what comes in from outside is 0."""
    angle = angle.to(images) if isinstance(angle, Tensor) else images.new_full((), angle)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    matrix = torch.stack([torch.stack([cos, -sin, zero]), torch.stack([sin, cos, zero])])
    grid = F.affine_grid(matrix.expand(len(images), 2, 3), images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def normalize(images: Tensor) -> Tensor:
    return (images - MEAN) / STD


def load(name: str, data_dir: str, device: torch.device) -> tuple[Split, Split, Split]:
    """(training, validation, test), all upright: MNIST 40,000/10,000/10,000, digits 1,000/297/500."""
    if name == "mnist":
        check_mnist(Path(data_dir))
        (images, labels), test = (_mnist(Path(data_dir), part) for part in ("train", "t10k"))
        parts = [(images[:40_000], labels[:40_000]), (images[50_000:], labels[50_000:]), test]
    else:
        images, labels = _digits()
        parts = [(images[a:b], labels[a:b]) for a, b in ((0, 1000), (1000, 1297), (1297, 1797))]
    return tuple(Split(x.unsqueeze(1).to(device), y.to(device)) for x, y in parts)


def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    images = F.interpolate(images, size=(28, 28), mode="bilinear", align_corners=False).squeeze(1)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))  # writers are in sequence
    return (images[order] * 255).round().to(torch.uint8), torch.tensor(digits.target)[order]


def _mnist(root: Path, part: str) -> tuple[Tensor, Tensor]:
    images, labels = (torch.frombuffer(bytearray(_content(root, f"{part}-{what}")), dtype=torch.uint8) for what in IDX)
    return images[16:].view(-1, 28, 28), labels[8:].long()




def data_fingerprint(name: str, data_dir: str) -> str | None:
    """What the record of a run says of the content of files; None for embedded data and MNIST as published, or not there."""
    if name != "mnist" or _missing(Path(data_dir)):
        return None
    check_mnist(Path(data_dir))
    found = {name: hashlib.sha256(_content(Path(data_dir), name)).hexdigest() for name in FILES}
    return None if found == PUBLISHED else fingerprint(*found.values())


def download_mnist(root: str) -> None:
    """Fetch those of the four files that are not there. What is there stays; what comes takes its place when it is whole."""
    raw = Path(root) / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    with open(Path(root) / "download.lock", "w") as lock:  # of several runs at once, one fetches and the others wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name in _missing(Path(root)):
            _fetch(name, raw / f"{name}.gz")
            _content.cache_clear()


def _fetch(name: str, path: Path) -> None:
    reasons = []
    for mirror in MIRRORS:
        try:
            with replacing(path) as temporary:
                with urllib.request.urlopen(f"{mirror}{name}.gz", timeout=60) as answer, open(temporary, "wb") as file:
                    shutil.copyfileobj(answer, file)
                if hashlib.sha256(_unpacked(temporary)).hexdigest() != PUBLISHED[name]:
                    raise ValueError("something else was sent")
            return
        except (OSError, ValueError) as error:  # HTTP errors are OSErrors
            reasons.append(f"{mirror}: {error}")
    raise OSError(f"MNIST could not be fetched into {path.parent}: {name}.gz: {'; '.join(reasons)}")


def _file(root: Path, name: str) -> Path | None:
    """The file of that name, unpacked or packed, if there is one."""
    folder = root / "MNIST" / "raw"
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.exists()), None)


def _missing(root: Path) -> list[str]:
    return [name for name in FILES if _file(root, name) is None]


def _unpacked(path: Path) -> bytes:
    """What a file holds, whatever its name says of how it is packed."""
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    try:
        return gzip.open(path).read() if packed else path.read_bytes()
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} is broken ({error})") from error


@lru_cache(maxsize=4)  # they are looked at before they are used
def _content(root: Path, name: str) -> bytes:
    return _unpacked(_file(root, name))


def check_mnist(root: Path) -> None:
    """ValueError or FileNotFoundError that names the file, if MNIST is not whole under `root`. Their content counts, not how
    they are packed, and nothing is fetched."""
    _content.cache_clear()
    advice = "Delete it and run again with --download"
    missing = _missing(root)
    if missing:
        raise FileNotFoundError(
            f"no MNIST under {root}: neither {root / 'MNIST' / 'raw' / missing[0]} nor {missing[0]}.gz is there. "
            "Name the folder with --data-dir, or add --download to fetch it into that folder"
        )
    for name, size in FILES.items():
        path = _file(root, name)
        try:
            content = _content(root, name)
        except ValueError as error:
            raise ValueError(f"{error}. {advice}") from error
        if len(content) != size:
            raise ValueError(f"{path} holds {len(content):,} bytes instead of {size:,}: cut short? {advice}")
        part, what = name.split("-", 1)
        magic, form = IDX[what]
        head = (magic, 60_000 if part == "train" else 10_000, *form)
        found = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(0, 4 * len(head), 4))
        if found != head:
            raise ValueError(f"{path} begins with the numbers {found}; an idx file of MNIST begins with {head}. {advice}")
        if not form and max(content[8:]) > 9:
            raise ValueError(f"{path} has labels up to {max(content[8:])}; 0 to 9 are accepted. {advice}")
