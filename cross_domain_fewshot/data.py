"""Domains of images, and the episodes that are drawn from them by a seed.

A domain is a folder `<data-dir>/<domain>` with the lists base.json, val.json and novel.json (classes to train on, to validate
on and to test on): {"label_names": [...], "image_names": [paths], "image_labels": [indices of label_names]}. Relative paths
start at the list's own folder. `prepare.py` writes them. Glyphs are drawn instead: characters are classes, fonts are domains.

What an episode holds depends on the seed and its number alone, so every method sees the same ones, in whatever order and by
however many workers they are loaded.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from evograd.lab import cli
from evograd.lab.checkpoints import outlive_signals
from evograd.lab.data import fingerprint, fingerprint_of_images, sent

DATASETS = ("glyphs", "filelists")
PAPER_DOMAINS = ("miniImagenet", "cub", "cars", "places", "plantae")  # the first one: encoder and auxiliary loss
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels
MARGIN = 1.15  # images are kept larger by this, for crops
GLYPH_IMAGES = 24  # of each class

GLYPH_FONTS = {
    "sans": "DejaVuSans.ttf",
    "serif": "DejaVuSerif.ttf",
    "mono": "DejaVuSansMono-Bold.ttf",
    "stix": "STIXGeneralItalic.ttf",
    "computer_modern": "cmtt10.ttf",
}


@dataclass
class Images:
    """The images of one list. labels: (n,).  pixels: (n, 1 or 3, size, size) uint8, or None if they are loaded when used."""

    domain: str
    split: str
    labels: np.ndarray
    names: list[str]
    size: int
    pixels: Tensor | None = None

    def __post_init__(self):
        self.classes = [np.flatnonzero(self.labels == label) for label in np.unique(self.labels)]

    def load(self, index: np.ndarray) -> Tensor:
        """Index of any shape -> (*index.shape, 3, size, size), uint8."""
        flat = index.reshape(-1)
        if self.pixels is not None:
            pixels = self.pixels[torch.from_numpy(flat)]
        else:
            pixels = torch.stack([decode(self.names[i], self.size) for i in flat])
        return pixels.expand(-1, 3, -1, -1).unflatten(0, index.shape)

    def cache(self) -> None:
        """Decode all images, once. ValueError names every file that is none, or not whole."""
        broken = []

        def pixels(name: str) -> Tensor | None:
            try:
                return decode(name, self.size)
            except ValueError as error:
                broken.append(str(error))

        with ThreadPoolExecutor(usable_cores()) as pool:
            decoded = list(pool.map(pixels, self.names))
        if broken:
            raise ValueError(f"{self.domain}/{self.split}: {len(broken)} of {len(decoded)} images: {'; '.join(sorted(broken))}")
        self.pixels = torch.stack(decoded)

    def episode(self, rng: np.random.Generator, n_way: int, n_images: int) -> np.ndarray:
        """Indices (n_way, n_images): n_way classes, n_images different images of each."""
        classes = rng.choice(len(self.classes), n_way, replace=False)
        return np.stack([rng.choice(self.classes[c], n_images, replace=False) for c in classes])

    def check(self, n_way: int, n_shot: int, n_query: int) -> None:
        """ValueError if the list cannot give an episode."""
        where, n = f"{self.domain}/{self.split}", len(self.classes)
        if n < n_way:
            split = "" if not self.names else "; prepare folders … --split gives a list more of them"
            smaller = f"; --n-way {n} takes them" if n > 1 else ""
            raise ValueError(f"{where} has {n} classes; an episode needs {n_way} (--n-way){smaller}{split}")
        smallest = min(self.classes, key=len)
        if len(smallest) < n_shot + n_query:
            folder = f", in {Path(self.names[smallest[0]]).parent}," if self.names else ""
            raise ValueError(
                f"{where}: class {self.labels[smallest[0]]}{folder} has {len(smallest)} images; an episode needs "
                f"{n_shot + n_query} of each class (--n-shot {n_shot} and --n-query {n_query})"
            )


def decode(name: str, size: int) -> Tensor:
    """An image file -> (3, size, size) uint8: the shorter side scaled to `size`, the middle cut out. ValueError names it."""
    from PIL import Image

    image = open_image(name, 2 * size)
    scale = size / min(image.size)
    image = image.resize([max(size, round(side * scale)) for side in image.size], Image.Resampling.BILINEAR)
    left, top = ((side - size) // 2 for side in image.size)
    return torch.from_numpy(np.array(image.crop((left, top, left + size, top + size)))).permute(2, 0, 1).contiguous()


def open_image(name: str | Path, at_least: int = 1 << 30):
    """A file -> a PIL image in RGB, upright, on white where it is transparent. ValueError names a file that is no image, or not whole.

    at_least: of a JPEG file that is 2, 4 or 8 times as large as that on both sides, no more is decoded than is left at a half, a
    quarter or an eighth of its size. What is made of it by scaling it to half of `at_least` differs by 3 of 255 (root mean square).
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(name) as opened:
            opened.draft(None, (at_least, at_least))
            image = ImageOps.exif_transpose(opened)  # cameras write how they were held, and turn nothing
            if image.mode.startswith("I"):  # 16 bits: PIL would cut off at 255
                pixels = np.asarray(image).astype(np.int64)
                pixels = np.where(pixels == image.info.get("transparency"), 2**16 - 1, pixels)
                return Image.fromarray((pixels >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
            if image.mode[-1] in "Aa" or "transparency" in image.info:  # what lies under alpha 0 was never to be seen
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is empty" if not Path(name).stat().st_size else f"{name} is no image") from error
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} cannot be read: {error or type(error).__name__}") from error


def load_domain(data: str, data_dir: str, domain: str, split: str, image_size: int) -> Images:
    """The images of one split of a domain: glyphs drawn, files not yet read. ValueError or FileNotFoundError if not there."""
    if data == "glyphs":
        if domain not in GLYPH_FONTS:
            raise ValueError(f"domain {domain!r} is not there; accepted: {', '.join(GLYPH_FONTS)}")
        return draw_glyphs(domain, split, image_size)
    path = Path(data_dir) / domain / f"{split}.json"
    if not path.is_file():
        there = sorted(p.parent.name for p in Path(data_dir).glob(f"*/{split}.json"))
        raise FileNotFoundError(
            f"domain {domain!r} is not there: no file {path}. Under --data-dir {data_dir}: {', '.join(there) or 'no domain'}. "
            "Name another folder, or write the lists by python -m cross_domain_fewshot.prepare"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        names, labels = content["image_names"], np.asarray(content["image_labels"], dtype=np.int64)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no file list (label_names, image_names, image_labels): {error!r}") from error
    if not names or len(names) != len(labels):
        raise ValueError(
            f"{path} names {len(names)} images and {len(labels)} labels; as many of one as of the other are needed"
        )
    names = [str(path.parent / name) for name in names]  # an absolute path stays itself
    missing = [name for name in names if not Path(name).is_file()]
    if missing:
        raise FileNotFoundError(f"{path}: {len(missing)} of {len(names)} images are missing, first {', '.join(missing[:3])}")
    empty = [name for name in names if not Path(name).stat().st_size]
    if empty:
        raise ValueError(f"{path}: {len(empty)} of {len(names)} images are empty files: {', '.join(empty)}")
    return Images(domain, split, labels, names, round(MARGIN * image_size))


def data_fingerprint(lists: Sequence[Images]) -> str | None:
    """What the record of a run says of the images that it reads; None for glyphs."""
    files = [images for images in lists if images.names]
    return fingerprint(*(fingerprint_of_images(images.names, images.labels) for images in files)) if files else None


def usable_cores() -> int:
    """Of this process, at most 16; its share where torchrun has started several."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, max(1, there // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def add_loading_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of every script that reads images."""
    add = parser.add_argument
    add("--cache-gb", type=cli.not_negative, default=4.0, help="decode all images into memory if they take no more")
    add("--workers", type=cli.at_least(0), help="processes that load image files; default: by cores. On a CPU none if memory holds all")


def prepare_loading(lists: Sequence[Images], cache_gb: float, workers: int | None, device: torch.device) -> int:
    """Decode all lists into memory if together they take no more than that. How many processes are to load batches.

    Where memory holds those of files, a few still do for a CUDA device, which then waits for no copy on the host.
    """
    total = sum(len(images.labels) * 3 * images.size**2 for images in lists if images.pixels is None)
    small = total <= cache_gb * 1e9
    for images in lists if small else ():
        if images.pixels is None:
            images.cache()
    if small and (device.type != "cuda" or not any(images.names for images in lists)):
        return 0
    return (min(4, usable_cores()) if small else usable_cores()) if workers is None else workers


def glyph_characters(font: str) -> str:
    """Characters that a font can draw, of Latin, Greek, Cyrillic and the mathematical operators, in the order of Unicode."""
    from matplotlib.ft2font import FT2Font

    blocks = [(0x21, 0x7F), (0xC0, 0x180), (0x386, 0x3D7), (0x400, 0x460), (0x2200, 0x2300)]
    able = FT2Font(font_file(font)).get_charmap()
    return "".join(chr(code) for first, last in blocks for code in range(first, last) if code in able)


def font_file(font: str) -> str:
    import matplotlib

    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / GLYPH_FONTS[font])


def draw_characters(font: str, size: int) -> Iterator[tuple[str, np.ndarray]]:
    """(character, (size, size) uint8), white on black, for each one that leaves a mark."""
    from PIL import Image, ImageDraw, ImageFont

    face = ImageFont.truetype(font_file(font), round(0.62 * size))
    for character in glyph_characters(font):
        image = Image.new("L", (size, size))
        ImageDraw.Draw(image).text((size / 2, size / 2), character, font=face, fill=255, anchor="mm")
        pixels = np.array(image)
        if pixels.any():
            yield character, pixels


@lru_cache
def look_alikes() -> frozenset[str]:
    """Characters that look like an earlier one of Unicode, as Α and А do like A: they would be one class in two splits."""
    known, found = set(), set()
    for character, pixels in draw_characters("sans", 64):
        if pixels.tobytes() in known:
            found.add(character)
        known.add(pixels.tobytes())
    return frozenset(found)


@lru_cache(maxsize=16)  # of a process that trains and tests again and again, such as the tests; nothing changes what is there
def draw_glyphs(font: str, split: str, size: int) -> Images:
    """Every character of one split in one font, GLYPH_IMAGES times, each turned, slanted, scaled and moved at random.

    Of four characters in the order of Unicode two are base, one val, one novel, by code: no character of one split is in
    another, whatever the font, and none that looks the same. White on black. Always the same images.
    """
    wanted = {"base": (0, 2), "val": (1,), "novel": (3,)}[split]
    drawn, codes = [], []
    for character, pixels in draw_characters(font, 2 * size):
        if ord(character) % 4 in wanted and character not in look_alikes():
            drawn.append(pixels)
            codes.append(ord(character))
    pixels = torch.from_numpy(np.stack(drawn)).unsqueeze(1).float().repeat_interleave(GLYPH_IMAGES, dim=0)
    generator = torch.Generator().manual_seed(list(GLYPH_FONTS).index(font))
    angle, slant, scale, x, y = (2 * torch.rand(5, len(pixels), generator=generator) - 1).unbind()
    angle, scale = 0.5 * angle, (0.25 * scale).exp()
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = [torch.stack([cos, 0.4 * slant - sin, 0.25 * x], 1), torch.stack([sin, cos, 0.25 * y], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(pixels.shape), align_corners=False)
    pixels = F.avg_pool2d(F.grid_sample(pixels, grid, align_corners=False), 2)
    labels = np.repeat(np.asarray(codes), GLYPH_IMAGES)
    return Images(font, split, labels, [], size, pixels.round().to(torch.uint8))


# Streams of random numbers; each draws from [seed, stream, number], so that none depends on how much another has drawn.
DOMAINS, SEEN, UNSEEN, AUXILIARY, TEST = range(5)


def domain_pair(seed: int, epoch: int, n_domains: int) -> tuple[int, int]:
    """The pseudo-seen and the pseudo-unseen domain of an epoch: two different ones of the seen domains."""
    return tuple(np.random.default_rng([seed, DOMAINS, epoch]).choice(n_domains, 2, replace=False).tolist())


class TrainingSteps(Dataset):
    """What step number t of a training run sees, as uint8: (pseudo-seen episode, pseudo-unseen episode, images, classes).

    Episodes are (n_way, n_shot + n_query, 3, size, size); the auxiliary images are of the first domain, with their classes
    numbered from zero. with_unseen=False leaves the pseudo-unseen episode out (an empty tensor).
    """

    def __init__(
        self,
        domains: Sequence[Images],
        seed: int,
        episodes_per_epoch: int,
        n_way: int,
        n_images: int,
        auxiliary_batch: int,
        with_unseen: bool,
    ):
        self.domains, self.seed, self.per_epoch = domains, seed, episodes_per_epoch
        self.n_way, self.n_images, self.auxiliary_batch, self.with_unseen = n_way, n_images, auxiliary_batch, with_unseen
        self.class_index = np.unique(domains[0].labels, return_inverse=True)[1]

    def __getitem__(self, t: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        seen, unseen = (self.domains[d] for d in domain_pair(self.seed, t // self.per_epoch, len(self.domains)))
        first = self.domains[0]
        rng = [np.random.default_rng([self.seed, stream, t]) for stream in (SEEN, UNSEEN, AUXILIARY)]
        index = rng[2].integers(len(first.labels), size=self.auxiliary_batch)
        return (
            seen.load(seen.episode(rng[0], self.n_way, self.n_images)),
            unseen.load(unseen.episode(rng[1], self.n_way, self.n_images)) if self.with_unseen else torch.empty(0),
            first.load(index),
            torch.from_numpy(self.class_index[index]),
        )


class TestEpisodes(Dataset):
    """Episode number t of a test on one list of images, as uint8."""

    __test__ = False  # no test case

    def __init__(self, images: Images, seed: int, n_way: int, n_images: int):
        self.images, self.seed, self.n_way, self.n_images = images, seed, n_way, n_images

    def __getitem__(self, t: int) -> Tensor:
        rng = np.random.default_rng([self.seed, TEST, t])
        return self.images.load(self.images.episode(rng, self.n_way, self.n_images))


def stream(dataset: Dataset, numbers: Sequence[int], n_workers: int, pin: bool) -> Iterator:
    """dataset[t] for t of numbers, loaded by workers ahead of time (0: here, when asked for)."""
    settings = dict(batch_size=None, num_workers=n_workers, worker_init_fn=outlive_signals, pin_memory=pin)
    return iter(DataLoader(dataset, sampler=numbers, **settings))


def normalize(pixels: Tensor) -> Tensor:
    """Pixels (…, 3, h, w) in [0, 1] -> what the networks take."""
    mean, std = _mean_and_std(pixels.dtype, pixels.device)
    return (pixels - mean) / std


@lru_cache
def _mean_and_std(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(v, dtype=dtype, device=device).view(3, 1, 1) for v in (MEAN, STD))


def centred(images: Tensor, size: int) -> Tensor:
    """uint8 images (…, 3, s, s) -> their middle (…, 3, size, size), normalised: what is tested on."""
    edge = (images.shape[-1] - size) // 2
    return normalize(images[..., edge : edge + size, edge : edge + size].float() / 255)


def augmented(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """uint8 images (…, 3, s, s) -> random crops (…, 3, size, size), mirrored and jittered, normalised: what is trained on.

    Crops of 8 to 100 % of the area with sides of 3:4 to 4:3, brightness, contrast and saturation by ± 40 %, for each image.
    """
    n = images.shape[:-3].numel()
    draws = sent(torch.rand(8, n, generator=generator), images.device)  # drawn on the host: the same on every device
    area, ratio = 0.08 + 0.92 * draws[0], ((2 * draws[1] - 1) * np.log(4 / 3)).exp()
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    x, y = (2 * draws[2] - 1) * (1 - width), (2 * draws[3] - 1) * (1 - height)
    mirror, zero = torch.where(draws[4] < 0.5, -1.0, 1.0), torch.zeros_like(x)
    rows = [torch.stack([width * mirror, zero, x], 1), torch.stack([zero, height, y], 1)]
    pixels = images.reshape(n, *images.shape[-3:]).float() / 255
    grid = F.affine_grid(torch.stack(rows, 1), [n, 3, size, size], align_corners=False)
    pixels = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    brightness, contrast, saturation = (0.6 + 0.8 * draws[5:]).view(3, n, 1, 1, 1)
    pixels = (pixels * brightness).clamp(0, 1)
    mean = pixels.mean((1, 2, 3), keepdim=True)
    pixels = (mean + (pixels - mean) * contrast).clamp(0, 1)
    grey = pixels.mean(1, keepdim=True)
    pixels = (grey + (pixels - grey) * saturation).clamp(0, 1)
    return normalize(pixels).reshape(*images.shape[:-3], 3, size, size)
