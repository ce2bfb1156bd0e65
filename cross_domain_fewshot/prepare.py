"""Write the file lists of a domain: base.json, val.json and novel.json.

    python -m cross_domain_fewshot.prepare cub DIR/CUB_200_2011 --out data          a data set of the paper, as shipped
    python -m cross_domain_fewshot.prepare folders DIR --domain mine --out data      a folder of images, one folder a class

Of four classes in order two are base, one val, one novel (miniImagenet has its own split). Where to get the data: README.md.
What the publisher's data must hold is checked, and every image is decoded once; nothing is copied, so the images must stay
where they are. Hidden files and folders are left out.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from evograd.lab import cli
from evograd.lab.records import write_text

from .data import open_image, usable_cores

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

    with ThreadPoolExecutor(usable_cores()) as pool:
        found = tqdm(pool.map(why, files, chunksize=16), total=len(files), desc="images", unit="image", mininterval=1)
        broken = [message for message in found if message]
    if broken:
        lines = "\n  ".join(broken)
        raise ValueError(f"{len(broken)} of {len(files):,} images cannot be used; take them away or mend them:\n  {lines}")


def alternate(classes):
    """{split: its classes}: of four in order, base, val, base, novel."""
    pattern = ("base", "val", "base", "novel")
    return {
        split: {name: files for i, (name, files) in enumerate(classes.items()) if pattern[i % 4] == split} for split in SPLITS
    }


def by_numbers(classes, numbers):
    """{split: its classes}: so many of each, spread over the classes in order."""
    if sum(numbers) != len(classes) or not all(numbers):
        given = " ".join(map(str, numbers))
        raise ValueError(f"--split {given} given; three numbers of classes from 1, {len(classes)} together, are accepted")
    places = sorted(((i + 0.5) / n, SPLITS[k]) for k, n in enumerate(numbers) for i in range(n))
    of = {name: split for name, (_, split) in zip(classes, places)}
    return {split: {name: files for name, files in classes.items() if of[name] == split} for split in SPLITS}


def mini_imagenet(root):
    """Folders train, val and test, each with one folder a class."""
    parts = {split: class_folders(inside(root, name)) for split, name in zip(SPLITS, ("train", "val", "test"))}
    for split, n in zip(SPLITS, (64, 16, 20)):
        if len(parts[split]) != n:
            raise ValueError(f"{root}: {len(parts[split])} classes in {split}, {n} are needed")
    return parts


def cub(root):
    """CUB_200_2011 with its folder images."""
    return alternate(class_folders(inside(root, "images")))


def cars(root):
    """A folder with cars_train (images) and devkit (cars_train_annos.mat, cars_meta.mat)."""
    from scipy.io import loadmat

    images, kit = inside(root, "cars_train"), inside(root, "devkit")
    names = [str(name[0]) for name in loadmat(str(inside(kit, "cars_meta.mat")))["class_names"][0]]
    classes = {name: [] for name in names}
    for row in loadmat(str(inside(kit, "cars_train_annos.mat")))["annotations"][0]:
        classes[names[int(row["class"][0, 0]) - 1]].append(images / str(row["fname"][0]))
    return alternate(classes)


def places(root):
    """places365_standard with its folder train; the first 200 images of each class."""
    return alternate(class_folders(inside(root, "train"), at_most=200))


def plantae(root):
    """The folder Plantae of iNaturalist 2018; the 200 classes with most images, 600 of each at the most."""
    classes = class_folders(root)
    largest = sorted(sorted(classes, key=lambda name: -len(classes[name]))[:200])
    return alternate({name: classes[name][:600] for name in largest})


def folders(root, numbers=None):
    """Any folder with one folder a class, or with folders train, val (or validation, valid, dev) and test of such folders."""
    there = {p.name.lower(): p for p in Path(root).iterdir() if p.is_dir() and not p.name.startswith((".", "__MACOSX"))}
    parts = [next((there[name] for name in names if name in there), None) for names in PARTS]
    if None in parts or len(there) != 3:
        classes = class_folders(root)
        return by_numbers(classes, numbers) if numbers else alternate(classes)
    if numbers:
        raise ValueError(f"--split given, but {root} is split already: {', '.join(p.name for p in parts)}")
    return {split: class_folders(part) for split, part in zip(SPLITS, parts)}


PARTS = (("train",), ("val", "validation", "valid", "dev"), ("test",))
READERS = {"folders": folders, "miniImagenet": mini_imagenet, "cub": cub, "cars": cars, "places": places, "plantae": plantae}


def inside(root, name):
    path = Path(root) / name
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there")
    return path


def write_lists(out, domain, parts):
    """The three lists of {split: its classes}; each knows all label names: a label means the same class in all of them."""
    names = list(dict.fromkeys(name for classes in parts.values() for name in classes))
    if all(list(classes) == sorted(classes) for classes in parts.values()):  # else the data set has an order of its own
        names.sort()
    for split in SPLITS:
        pairs = [(str(f), i) for i, name in enumerate(names) for f in parts[split].get(name, ())]
        content = {"label_names": names, "image_names": [f for f, _ in pairs], "image_labels": [i for _, i in pairs]}
        write_text(Path(out) / domain / f"{split}.json", json.dumps(content))
        print(f"{Path(out) / domain / split}.json: {len(set(content['image_labels']))} classes, {len(pairs)} images")
    few = {split: len(parts[split]) for split in SPLITS if len(parts[split]) < 5}
    if few:
        found = ", ".join(f"{split} {n}" for split, n in few.items())
        print(f"fewer classes than an episode of --n-way 5 needs: {found}. train.py takes a smaller --n-way; see also --split")


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__)
    parser.add_argument("kind", choices=tuple(READERS), help="what the folder holds")
    parser.add_argument("folder", help="the data")
    parser.add_argument("--domain", help="its name; default: that of the data set")
    parser.add_argument("--out", default="data", metavar="DIR", help="--data-dir of the other scripts")
    parser.add_argument(
        "--split",
        nargs=3,
        type=cli.at_least(1),
        metavar=("BASE", "VAL", "NOVEL"),
        help="numbers of classes (folders); default: two of four are base, one val, one novel",
    )
    args = parser.parse_args(argv)
    if args.split and args.kind != "folders":
        parser.error(f"--split given, but {args.kind} has its own split; folders reads it")
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
        parts = folders(root, args.split) if args.kind == "folders" else READERS[args.kind](root)
        files = [f for classes in parts.values() for images in classes.values() for f in images]
        found = len({name for classes in parts.values() for name in classes}), len(files)
        for what, n, needed in zip(("classes", "images"), found, EXPECTED.get(args.kind, (None, None))):
            if needed is not None and n != needed:
                raise ValueError(f"{root} gives {n:,} {what} for {args.kind}; {needed:,} are needed. Is it unpacked whole?")
        check_images(files)
        write_lists(args.out, args.domain, parts)


if __name__ == "__main__":
    main()
