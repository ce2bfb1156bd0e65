"""Write the file lists of a domain: base.json, val.json and novel.json.

    python -m cross_domain_fewshot.prepare cub DIR/CUB_200_2011 --out data          a data set of the paper, as shipped
    python -m cross_domain_fewshot.prepare folders DIR --domain mine --out data      a folder of images, one folder a class

Of four classes in order two are base, one val, one novel (miniImagenet has its own split). Where to get the data: README.md.
What the publisher's data must hold is checked, and every image is decoded once; nothing is copied, so the images must stay
where they are. Hidden files and folders are left out.
"""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from evograd.lab import cli
from evograd.lab.records import write_text

from .data import open_image

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
SPLITS = ("base", "val", "novel")
# Classes and images in the lists of each data set; None where that depends on the release.
EXPECTED = {
    "miniImagenet": (100, 60_000),  # 64, 16 and 20 classes of 600
    "cub": (200, 11_788),
    "cars": (196, 8_144),  # the training images: only these come with labels
    "places": (365, 365 * 200),
    "plantae": (200, None),
}


def class_folders(root, at_most=None):
    """{class: images} of a folder with one folder a class, both in order. Hidden ones, and what systems leave, are none."""
    folders = sorted(p for p in Path(root).iterdir() if p.is_dir() and not p.name.startswith((".", "__MACOSX")))
    images = {p.name: sorted(f for f in p.iterdir() if is_image(f))[:at_most] for p in folders}
    images = {name: files for name, files in images.items() if files}
    if not images:
        raise ValueError(f"{root} has no folder with images ({', '.join(SUFFIXES)}) in it; one folder a class is needed")
    return images


def is_image(path):
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def check_images(files):
    """ValueError that names every file that cannot be decoded: here, and not in the middle of a training."""

    def why(path):
        try:
            open_image(path)
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        found = tqdm(pool.map(why, files, chunksize=16), total=len(files), desc="images", unit="image", mininterval=1)
        broken = [message for message in found if message]
    if broken:
        lines = "\n  ".join(broken)
        raise ValueError(f"{len(broken)} of {len(files):,} images cannot be used; take them away or mend them:\n  {lines}")


def alternate(classes):
    """Class number i -> its split: base, val, base, novel, and so on."""
    return {name: ("base", "val", "base", "novel")[i % 4] for i, name in enumerate(classes)}


def mini_imagenet(root):
    """Folders train, val and test, each with one folder a class."""
    parts = {split: class_folders(inside(root, name)) for split, name in zip(SPLITS, ("train", "val", "test"))}
    for split, n in zip(SPLITS, (64, 16, 20)):
        if len(parts[split]) != n:
            raise ValueError(f"{root}: {len(parts[split])} classes in {split}, {n} are needed")
    classes = {name: files for part in parts.values() for name, files in part.items()}
    return classes, {name: split for split, part in parts.items() for name in part}


def cub(root):
    """CUB_200_2011 with its folder images."""
    classes = class_folders(inside(root, "images"))
    return classes, alternate(classes)


def cars(root):
    """A folder with cars_train (images) and devkit (cars_train_annos.mat, cars_meta.mat)."""
    from scipy.io import loadmat

    images, kit = inside(root, "cars_train"), inside(root, "devkit")
    names = [str(name[0]) for name in loadmat(str(inside(kit, "cars_meta.mat")))["class_names"][0]]
    classes = {name: [] for name in names}
    for row in loadmat(str(inside(kit, "cars_train_annos.mat")))["annotations"][0]:
        classes[names[int(row["class"][0, 0]) - 1]].append(images / str(row["fname"][0]))
    return classes, alternate(classes)


def places(root):
    """places365_standard with its folder train; the first 200 images of each class."""
    classes = class_folders(inside(root, "train"), at_most=200)
    return classes, alternate(classes)


def plantae(root):
    """The folder Plantae of iNaturalist 2018; the 200 classes with most images, 600 of each at the most."""
    classes = class_folders(root)
    largest = sorted(sorted(classes, key=lambda name: -len(classes[name]))[:200])
    classes = {name: classes[name][:600] for name in largest}
    return classes, alternate(classes)


def folders(root):
    """Any folder with one folder a class."""
    classes = class_folders(root)
    return classes, alternate(classes)


READERS = {"folders": folders, "miniImagenet": mini_imagenet, "cub": cub, "cars": cars, "places": places, "plantae": plantae}


def inside(root, name):
    path = Path(root) / name
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there")
    return path


def write_lists(out, domain, classes, split_of):
    """The three lists; every one knows all label names, so that a label means the same class in all of them."""
    names = list(classes)
    for split in SPLITS:
        pairs = [(str(f), i) for i, name in enumerate(names) if split_of[name] == split for f in classes[name]]
        content = {"label_names": names, "image_names": [f for f, _ in pairs], "image_labels": [i for _, i in pairs]}
        write_text(Path(out) / domain / f"{split}.json", json.dumps(content))
        print(f"{Path(out) / domain / split}.json: {len(set(content['image_labels']))} classes, {len(pairs)} images")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.Help)
    parser.add_argument("kind", choices=tuple(READERS), help="what the folder holds")
    parser.add_argument("folder", help="the data")
    parser.add_argument("--domain", help="its name; default: that of the data set")
    parser.add_argument("--out", default="data", metavar="DIR", help="--data-dir of the other scripts")
    args = parser.parse_args(argv)
    if args.kind == "folders" and not args.domain:
        parser.error("--domain is needed: the name that the other scripts know these images by")
    args.domain = args.domain or args.kind
    return args


def main(argv=None):
    args = parse_args(argv)
    with cli.exit_on_bad_input():
        root = Path(args.folder).resolve()
        if not root.is_dir():
            raise FileNotFoundError(f"no folder {args.folder}")
        classes, split_of = READERS[args.kind](root)
        found = len(classes), sum(map(len, classes.values()))
        for what, n, needed in zip(("classes", "images"), found, EXPECTED.get(args.kind, (None, None))):
            if needed is not None and n != needed:
                raise ValueError(f"{root} gives {n:,} {what} for {args.kind}; {needed:,} are needed. Is it unpacked whole?")
        check_images([f for files in classes.values() for f in files])
        write_lists(args.out, args.domain, classes, split_of)


if __name__ == "__main__":
    main()
