"""MNIST (files) and scikit-learn's digits (embedded), as uint8 images on the training device."""

from __future__ import annotations

import fcntl
import gzip
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

TRUE_ANGLE = math.radians(30)
MEAN, STD = 0.1307, 0.3081

DATASETS = ("digits", "mnist")
FILES = {  # of MNIST: name -> bytes when unpacked
    "train-images-idx3-ubyte": 16 + 60_000 * 28 * 28,
    "train-labels-idx1-ubyte": 8 + 60_000,
    "t10k-images-idx3-ubyte": 16 + 10_000 * 28 * 28,
    "t10k-labels-idx1-ubyte": 8 + 10_000,
}


@dataclass
class Split:
    """images: (n, 1, 28, 28), uint8.  labels: (n,), int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels in [0, 1] and labels."""
        index = index.to(self.labels.device)
        return self.images[index].float() / 255, self.labels[index]


def rotate(images: Tensor, angle: Tensor | float) -> Tensor:
    """Turn images (n, 1, h, w) by `angle` radians about their centre, differentiably; what comes in from outside is 0."""
    angle = torch.as_tensor(angle, dtype=images.dtype, device=images.device)
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
        images, labels = _mnist(Path(data_dir), train=True)
        test = _mnist(Path(data_dir), train=False)
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


def _mnist(root: Path, train: bool) -> tuple[Tensor, Tensor]:
    from torchvision.datasets import MNIST

    dataset = MNIST(root, train=train, download=True)  # the files are there: this unpacks them if need be, and loads
    return dataset.data, dataset.targets


def download_mnist(root: str) -> None:
    from torchvision.datasets import MNIST

    Path(root).mkdir(parents=True, exist_ok=True)
    with open(Path(root) / "download.lock", "w") as lock:  # of several runs at once, one fetches and the others wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            MNIST(root, download=True)
        except RuntimeError as error:
            raise OSError(f"MNIST could not be fetched into {root}: {error}") from error


def check_mnist(root: Path) -> None:
    """ValueError or FileNotFoundError that names the file, if MNIST is not whole under `root`."""
    folder = root / "MNIST" / "raw"
    for name, size in FILES.items():
        plain, packed = folder / name, folder / f"{name}.gz"
        if plain.exists():
            found = plain.stat().st_size
            if found != size:
                raise ValueError(
                    f"{plain} has {found:,} bytes instead of {size:,}: cut short? Delete it and run again with --download"
                )
        elif packed.exists():
            try:
                with gzip.open(packed) as file:
                    found = sum(len(block) for block in iter(lambda: file.read(1 << 20), b""))
            except (EOFError, OSError) as error:
                raise ValueError(f"{packed} is broken ({error}). Delete it and run again with --download") from error
            if found != size:
                raise ValueError(f"{packed} holds {found:,} bytes instead of {size:,}. Delete it and run again with --download")
        else:
            raise FileNotFoundError(
                f"no MNIST under {root}: neither {plain} nor {packed.name} is there. "
                "Name the folder with --data-dir, or add --download to fetch it into that folder"
            )
