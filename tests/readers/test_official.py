"""Official files: tiny sets in their layouts, and the real ones of ../shared/data."""

import gzip
import pickle
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from data_helpers import RNG, config_for, random_pixels
from PIL import Image

from datasets import read_dataset
from readers import official
from readers.download import compute_digest
from support.errors import UserError

REPO = ROOT
SHARED = REPO.parent / "shared" / "data"


def test_digits_are_split_once_and_for_all(tmp_path):
    from sklearn.datasets import load_digits

    config = config_for("digits", (1, 8, 8))
    train, test = (read_dataset(config, tmp_path, split) for split in ("train", "test"))
    assert (train.images.shape, test.images.shape) == ((1437, 1, 8, 8), (360, 1, 8, 8))
    assert (train.images.min(), train.images.max()) == (0, 255)
    share = np.bincount(test.labels) / np.bincount(np.r_[train.labels, test.labels])
    assert np.abs(share - 360 / 1797).max() < 0.005
    both = np.concatenate((train.images, test.images)).reshape(1797, 64) * (16 / 255)
    rows = sorted(map(tuple, np.rint(both).astype(int).tolist()))
    assert rows == sorted(map(tuple, load_digits().data.astype(int).tolist()))
    assert train.class_names == list("0123456789")


def write_idx(path: Path, array: np.ndarray) -> None:
    header = [0, 0, 8, array.ndim, *b"".join(n.to_bytes(4, "big") for n in array.shape)]
    path.write_bytes(bytes(header) + array.tobytes())


@pytest.fixture
def mnist(tmp_path) -> Path:
    """A partial MNIST: 20 images to train, 10 to test."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, n in (("train", 20), ("t10k", 10)):
        images = RNG.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        write_idx(raw / f"{prefix}-images-idx3-ubyte", images)
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", np.arange(n, dtype=np.uint8) % 10)
    return tmp_path


def test_a_partial_mnist_is_read(mnist):
    data = read_dataset(config_for("mnist", (1, 28, 28)), mnist, "train")
    stored_bytes = (mnist / "MNIST/raw/train-images-idx3-ubyte").read_bytes()[16:]
    assert data.images.shape == (20, 1, 28, 28)
    assert data.images.tobytes() == stored_bytes
    assert data.labels.tolist() == [*range(10), *range(10)]
    assert data.class_names == list("0123456789")


def test_compressed_files_put_there_by_hand_are_unpacked(mnist, monkeypatch):
    from torchvision.datasets import MNIST

    file = mnist / "MNIST/raw/t10k-images-idx3-ubyte"
    before = file.read_bytes()
    packed = file.with_name("t10k-images-idx3-ubyte.gz")
    packed.write_bytes(gzip.compress(before))
    file.unlink()
    sums = [
        (name, compute_digest(packed) if name == packed.name else "") for name, _ in MNIST.resources
    ]
    monkeypatch.setattr(MNIST, "resources", sums)
    data = read_dataset(config_for("mnist", (1, 28, 28)), mnist, "test")
    assert data.images.tobytes() == before[16:]


@pytest.mark.parametrize("damage", ["truncated", "empty", "labels of another set"])
def test_damaged_idx_files(mnist, damage):
    raw = mnist / "MNIST/raw"
    images = raw / "train-images-idx3-ubyte"
    if damage == "truncated":
        images.write_bytes(images.read_bytes()[:5000])
    elif damage == "empty":
        images.write_bytes(b"")
    else:
        shutil.copy(raw / "t10k-labels-idx1-ubyte", raw / "train-labels-idx1-ubyte")
    with pytest.raises(UserError, match="files of train are damaged"):
        read_dataset(config_for("mnist", (1, 28, 28)), mnist, "train")


@pytest.fixture
def cifar_archive(tmp_path, monkeypatch) -> np.ndarray:
    """A CIFAR-10 of 60 images as an archive in tmp_path; returns their pixels."""
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "made" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    data = RNG.integers(0, 256, (6, 10, 3072), dtype=np.uint8)
    batches = [name for name, _ in CIFAR10.train_list + CIFAR10.test_list]
    for name, pixels in zip(batches, data, strict=True):
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": list(range(10))}))
    meta = {"label_names": [f"class {i}" for i in range(10)]}
    (folder / CIFAR10.meta["filename"]).write_bytes(pickle.dumps(meta))
    sums = [[name, compute_digest(folder / name)] for name in batches]
    monkeypatch.setattr(CIFAR10, "train_list", sums[:5])
    monkeypatch.setattr(CIFAR10, "test_list", sums[5:])
    meta_file = folder / CIFAR10.meta["filename"]
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": compute_digest(meta_file)})
    with tarfile.open(tmp_path / CIFAR10.filename, "w:gz") as file:
        file.add(folder, CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "tgz_md5", compute_digest(tmp_path / CIFAR10.filename))
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:1/")
    monkeypatch.setattr(official, "CIFAR10_MIRROR", "http://127.0.0.1:1/")
    return data.reshape(60, 3, 32, 32)


def test_an_archive_put_there_by_hand_is_unpacked_and_read(cifar_archive, tmp_path):
    train = read_dataset(config_for("cifar10"), tmp_path, "train")
    (tmp_path / "cifar-10-python.tar.gz").unlink()
    test = read_dataset(config_for("cifar10"), tmp_path, "test")
    assert np.array_equal(np.concatenate((train.images, test.images)), cifar_archive)
    assert train.labels.tolist() == [*range(10)] * 5
    assert train.class_names[9] == "class 9"


def test_a_changed_batch_file_is_refused(cifar_archive, tmp_path):
    read_dataset(config_for("cifar10"), tmp_path, "train")
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"other")
    with pytest.raises(UserError, match="is not the original: remove this folder"):
        read_dataset(config_for("cifar10"), tmp_path, "test")


def test_a_dataset_that_is_not_there_and_cannot_be_downloaded(cifar_archive, tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").unlink()
    with pytest.raises(UserError, match="could not be downloaded") as error:
        read_dataset(config_for("cifar10"), tmp_path, "train")
    assert str(tmp_path / "cifar-10-python.tar.gz") in str(error.value)


@pytest.fixture
def tiny(tmp_path) -> Path:
    root = tmp_path / "tiny-imagenet-200"
    (root / "val" / "images").mkdir(parents=True)
    (root / "words.txt").write_text("n01\tgoldfish, Carassius auratus\nn02\tcentipede\n")
    for wnid in ("n02", "n01"):
        (root / "train" / wnid / "images").mkdir(parents=True)
        Image.fromarray(random_pixels(64, 64)).save(root / f"train/{wnid}/images/{wnid}_0.JPEG")
    lines = []
    for i, wnid in enumerate(["n02", "n01", "n02"]):
        Image.new("L", (64, 64), 100 * i).save(root / f"val/images/val_{i}.JPEG")
        lines.append(f"val_{i}.JPEG\t{wnid}\t0\t0\t63\t63\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    return tmp_path


TINY = config_for("tiny", (3, 64, 64), classes=200)


def test_tiny_imagenet_takes_its_labels_from_the_annotations(tiny):
    data = read_dataset(TINY, tiny, "test")
    assert data.name == "tiny_imagenet"
    assert data.labels.tolist() == [1, 0, 1]
    assert data.class_names == ["goldfish", "centipede"]
    assert [int(image.min()) for image in data.images] == [0, 100, 200]
    assert read_dataset(TINY, tiny, "train").labels.tolist() == [0, 1]


@pytest.mark.parametrize("damage", ["image gone", "no label", "class unknown", "no annotations"])
def test_an_incomplete_tiny_imagenet(tiny, damage):
    val = tiny / "tiny-imagenet-200" / "val"
    if damage == "image gone":
        (val / "images/val_1.JPEG").unlink()
        message = "val_1.JPEG (No such file or directory)"
    elif damage == "no label":
        shutil.copy(val / "images/val_1.JPEG", val / "images/val_9.JPEG")
        message = "1 files have no label in val_annotations.txt, such as val_9.JPEG"
    elif damage == "class unknown":
        (val / "val_annotations.txt").write_text("val_0.JPEG\tn09\n")
        message = "val_0.JPEG is of class 'n09', which train has not"
    else:
        (val / "val_annotations.txt").unlink()
        message = "val_annotations.txt: not there"
    with pytest.raises(UserError) as error:
        read_dataset(TINY, tiny, "test")
    assert message in str(error.value)


# --- the real images of ../shared/data


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The folder that has a dataset's real files: the repository's data/, or unpacked anew."""

    def folder(name: str, marker: str) -> Path:
        if (REPO / "data" / marker).exists():
            return REPO / "data"
        if not (SHARED / "unpack.sh").exists():
            pytest.skip(f"no {name} in data/, and no ../shared/data")
        target = tmp_path_factory.mktemp(name)
        subprocess.run(["bash", SHARED / "unpack.sh", target, name], check=True)
        return target

    return folder


def test_cifar10_has_its_known_means_and_deviations(real):
    data_dir = real("cifar10", "cifar10/.unpacked")
    train = read_dataset(config_for("cifar10"), data_dir, "train")
    assert np.bincount(train.labels).tolist() == [5000] * 10
    levels = np.arange(256) / 255
    for channel, mean, deviation in ((0, 0.4914, 0.2470), (1, 0.4822, 0.2435), (2, 0.4465, 0.2616)):
        p = np.bincount(train.images[:, channel].ravel(), minlength=256) / (50_000 * 1024)
        assert round(p @ levels, 4) == mean
        assert round(np.sqrt(p @ levels**2 - (p @ levels) ** 2), 4) == deviation
    test = read_dataset(config_for("cifar10"), data_dir, "test")
    assert np.bincount(test.labels).tolist() == [1000] * 10


@pytest.mark.parametrize(("name", "train_size"), [("mnist", 17_000), ("fashion_mnist", 60_000)])
def test_mnist_and_fashion_mnist(real, name, train_size):
    data_dir = real("mnist", "FashionMNIST/raw/.unpacked")
    for split, size in (("train", train_size), ("test", 10_000)):
        data = read_dataset(config_for(name, (1, 28, 28)), data_dir, split)
        assert data.images.shape == (size, 1, 28, 28)
        assert set(data.labels.tolist()) == set(range(10))
    assert len(data.class_names) == 10


def test_twenty_classes_of_tiny_imagenet(real):
    data_dir = real("tiny_imagenet", "tiny-imagenet-200/.unpacked")
    train, test = (read_dataset(TINY, data_dir, split) for split in ("train", "test"))
    assert np.bincount(train.labels).tolist() == [500] * 20
    assert np.bincount(test.labels).tolist() == [50] * 20
    images = np.concatenate((train.images, test.images))
    grey = (images == images[:, :1]).all(axis=(1, 2, 3))
    assert grey.sum() >= 158
    assert "goldfish" in train.class_names
