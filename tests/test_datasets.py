"""Datasets: exact pixels, the array kept beside image files, official files, bad input."""

import gzip
import logging
import pickle
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import datasets
import image_files
import official
from config import Config, parse_config
from datasets import load_dataset
from download import md5_of
from errors import UserError
from utils import log

REPO = Path(__file__).resolve().parent.parent
SHARED = REPO.parent / "shared" / "data"
RNG = np.random.default_rng(0)


def config_for(dataset: str, shape=(3, 32, 32), classes: int = 10) -> Config:
    network = {"image_shape": list(shape), "ch_mults": [1], "is_attn": [False]}
    return parse_config({"dataset": dataset, "classes": classes, "network": network})


FOLDER = config_for("folder", (3, 8, 8), classes=2)


def random_pixels(height: int = 8, width: int = 8) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def tree(tmp_path) -> Path:
    """cat and dog, three PNGs of 8x8 each in train and test."""
    for split in ("train", "test"):
        for name in ("dog", "cat"):
            folder = tmp_path / "folder" / split / name
            folder.mkdir(parents=True)
            for i in range(3):
                Image.fromarray(random_pixels()).save(folder / f"{i}.png")
    return tmp_path


@pytest.fixture
def messages(monkeypatch) -> list[str]:
    """What is logged while the test runs."""
    found = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    monkeypatch.setattr(log, "handlers", [handler])
    monkeypatch.setattr(log, "level", logging.INFO)
    log.manager._clear_cache()
    datasets._note_once.cache_clear()
    return found


def stored(root: Path) -> list[str]:
    cache = root / ".cache"
    return sorted(path.name for path in cache.iterdir()) if cache.exists() else []


def forbid_decoding(monkeypatch) -> None:
    def fail(*args):
        raise AssertionError("decoded again")

    monkeypatch.setattr(image_files, "decode", fail)


# --- class folders


def test_class_folders_keep_every_pixel_in_alphabetical_order(tree):
    (tree / "folder" / "train" / ".hidden").mkdir()
    (tree / "folder" / "train" / "cat" / ".DS_Store").write_text("hidden")
    data = load_dataset(FOLDER, tree, "train")
    paths = [tree / "folder/train" / c / f"{i}.png" for c in ("cat", "dog") for i in range(3)]
    expected = np.stack([np.asarray(Image.open(path)).transpose(2, 0, 1) for path in paths])
    assert np.array_equal(data.images, expected)
    assert data.images.dtype == np.uint8
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.labels.dtype == np.int64
    assert data.class_names == ["cat", "dog"]
    assert (data.name, data.split, len(data)) == ("folder", "train", 6)


def test_data_dir_itself_may_hold_the_class_folders(tree):
    assert len(load_dataset(FOLDER, tree / "folder", "test")) == 6


def test_class_folders_win_over_official_files(tree):
    (tree / "folder").rename(tree / "digits")
    data = load_dataset(config_for("digits", (1, 8, 8)), tree, "train")
    assert data.class_names == ["cat", "dog"]
    assert data.images.shape == (6, 1, 8, 8)


def test_images_are_decoded_once(tree, monkeypatch):
    first = load_dataset(FOLDER, tree, "train")
    forbid_decoding(monkeypatch)
    second = load_dataset(FOLDER, tree, "train")
    assert isinstance(second.images, np.memmap)
    assert not second.images.flags.writeable
    assert np.array_equal(first.images, second.images)
    moved = tree.rename(tree.with_name("moved"))
    assert len(load_dataset(FOLDER, moved, "train")) == 6


@pytest.mark.parametrize("change", ["pixels", "added", "removed", "renamed"])
def test_the_array_is_renewed_when_files_change(tree, change):
    before = load_dataset(FOLDER, tree, "train")
    old = np.array(before.images)
    load_dataset(FOLDER, tree, "test")
    file = tree / "folder/train/cat/0.png"
    if change == "pixels":
        Image.fromarray(random_pixels()).save(file)
    elif change == "added":
        Image.fromarray(random_pixels()).save(file.with_name("3.png"))
    elif change == "removed":
        file.unlink()
    else:
        file.rename(file.with_name("9.png"))
    after = load_dataset(FOLDER, tree, "train")
    assert not np.array_equal(after.images, old)
    assert np.array_equal(before.images, old), "an array in use must not change"
    kinds = [name.split("-")[0] + Path(name).suffix for name in stored(tree / "folder")]
    assert kinds == ["test.json", "test.npy", "train.json", "train.npy"], "an old one was left"


def test_each_shape_has_its_own_array(tree):
    small = config_for("folder", (1, 4, 4), classes=2)
    assert load_dataset(FOLDER, tree, "train").images.shape == (6, 3, 8, 8)
    assert load_dataset(small, tree, "train").images.shape == (6, 1, 4, 4)
    assert len(stored(tree / "folder")) == 4


def test_a_damaged_array_is_decoded_again(tree):
    first = np.array(load_dataset(FOLDER, tree, "train").images)
    (array,) = (tree / "folder/.cache").glob("*.npy")
    array.write_bytes(array.read_bytes()[:200])
    assert np.array_equal(load_dataset(FOLDER, tree, "train").images, first)


def test_a_full_disk_costs_only_the_kept_array(tree, monkeypatch, messages):
    def full(file, images):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(image_files.np, "save", full)
    assert load_dataset(FOLDER, tree, "train").images.shape == (6, 3, 8, 8)
    assert "No space left on device" in messages[0]
    assert stored(tree / "folder") == []


def test_the_fingerprint_follows_pixels_and_labels(tree):
    data = load_dataset(FOLDER, tree, "train")
    images, labels = np.array(data.images), data.labels.copy()
    same = datasets.Dataset("other", "test", images, labels, [])
    assert same.fingerprint() == data.fingerprint()
    images[0, 0, 0, 0] ^= 1
    changed = same.fingerprint()
    assert changed != data.fingerprint()
    labels[0] = 1
    assert same.fingerprint() not in (changed, data.fingerprint())


# --- conversions


def decoded(image: Image.Image, path: Path, shape=(3, 8, 8), **options) -> np.ndarray:
    image.save(path, **options)
    return image_files.decode(str(path), shape)


def test_transparency_becomes_white(tmp_path):
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[..., :3] = (10, 20, 30)
    rgba[:4, :, 3] = 255
    pixels = decoded(Image.fromarray(rgba), tmp_path / "a.png")
    assert (pixels[:, :4] == np.array([10, 20, 30])[:, None, None]).all()
    assert (pixels[:, 4:] == 255).all()
    grey = decoded(Image.fromarray(rgba[..., [0, 3]]), tmp_path / "b.png", (1, 8, 8))
    assert grey[0, 0, 0] == 10
    assert grey[0, 7, 7] == 255


def test_a_palette_with_a_transparent_entry(tmp_path):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.putpixel((0, 0), 0)
    pixels = decoded(image, tmp_path / "a.gif", transparency=0)
    assert pixels[:, 0, 0].tolist() == [255, 255, 255]
    assert pixels[:, 7, 7].tolist() == [200, 100, 50]


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_16_bit_grey_is_scaled_to_8(tmp_path, suffix):
    levels = np.array([0, 127, 129, 257, 32768, 65535] + [0] * 58, np.uint16).reshape(8, 8)
    pixels = decoded(Image.fromarray(levels), tmp_path / f"a{suffix}")
    assert pixels[0].ravel()[:6].tolist() == [0, 0, 1, 1, 128, 255]
    assert (pixels == pixels[:1]).all()


def test_grey_to_colour_and_back(tmp_path):
    grey = random_pixels()[..., 0]
    path = tmp_path / "a.png"
    assert (decoded(Image.fromarray(grey), path) == grey).all()
    assert np.array_equal(decoded(Image.fromarray(grey), path, (1, 8, 8))[0], grey)
    colour = random_pixels()
    luma = colour @ np.array([0.299, 0.587, 0.114])  # ITU-R 601
    assert np.abs(decoded(Image.fromarray(colour), path, (1, 8, 8))[0] - luma).max() <= 1


@pytest.mark.parametrize("wide", [True, False])
def test_the_centre_is_kept_of_an_oblong_image(tmp_path, wide):
    bands = np.full((32, 96, 3), 255, np.uint8)
    bands[:, 32:64] = (10, 200, 30)
    image = Image.fromarray(bands if wide else bands.transpose(1, 0, 2))
    pixels = decoded(image, tmp_path / "a.png")[:, 2:-2, 2:-2]  # the filter is 2 pixels wide
    assert (pixels == np.array([10, 200, 30])[:, None, None]).all()


def test_a_photo_is_turned_upright(tmp_path):
    half = np.zeros((8, 8, 3), np.uint8)
    half[:, :4] = 255  # white on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # stored a quarter turn to the left
    pixels = decoded(Image.fromarray(half), tmp_path / "a.png", exif=exif)
    assert (pixels[:, :4] == 255).all()
    assert (pixels[:, 4:] == 0).all()


# --- bad image files


def spoil(tree: Path) -> None:
    cat, dog = tree / "folder/train/cat", tree / "folder/train/dog"
    (cat / "notes.txt").write_text("not an image")
    (cat / "empty.png").touch()
    (dog / "link.png").symlink_to(dog / "nowhere.png")
    Image.fromarray(random_pixels(64, 64)).save(dog / "cut.png")
    (dog / "cut.png").write_bytes((dog / "cut.png").read_bytes()[:4000])


def test_bad_files_are_named_and_nothing_is_kept(tree):
    spoil(tree)
    with pytest.raises(UserError) as error:
        load_dataset(FOLDER, tree, "train")
    lines = str(error.value).splitlines()
    assert len(lines) == 2
    assert "4 of 10 files" in lines[0]
    assert "train/cat/empty.png (not an image)" in lines[0]
    assert "train/cat/notes.txt (not an image)" in lines[0]
    assert "and 1 more" in lines[0]
    assert "--skip_bad_images" in lines[1]
    assert stored(tree / "folder") == []


def test_bad_files_are_left_out_on_request_only(tree, messages, monkeypatch):
    good = np.array(load_dataset(FOLDER, tree, "train").images)
    spoil(tree)
    data = load_dataset(FOLDER, tree, "train", skip_bad_images=True)
    assert np.array_equal(data.images, good)
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert "4 of 10 files" in messages[0]
    forbid_decoding(monkeypatch)
    again = load_dataset(FOLDER, tree, "train", skip_bad_images=True)
    assert np.array_equal(again.images, good)
    assert len(messages) == 2, "the warning is repeated at every start"
    with pytest.raises(UserError, match="4 of 10 files"):
        load_dataset(FOLDER, tree, "train")


def test_a_class_without_any_readable_image(tree):
    for file in (tree / "folder/train/dog").iterdir():
        file.write_text("foreign")
    with pytest.raises(UserError, match="no readable image of class dog"):
        load_dataset(FOLDER, tree, "train", skip_bad_images=True)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_of_unknown_range_are_refused(tmp_path, mode):
    Image.new(mode, (8, 8), 70000).save(tmp_path / "a.tif")
    with pytest.raises(image_files.UNREADABLE, match="range is unknown"):
        image_files.decode(str(tmp_path / "a.tif"), (3, 8, 8))


# --- folders, names, shapes and classes that do not fit


def test_an_empty_class_folder(tree):
    (tree / "folder/train/ant").mkdir()
    (tree / "folder/test/ant").mkdir()
    with pytest.raises(UserError, match="train/ant: no images"):
        load_dataset(config_for("folder", (3, 8, 8), 3), tree, "train")


@pytest.mark.parametrize(("split", "other"), [("train", "test"), ("test", "train")])
@pytest.mark.parametrize("asked", ["train", "test"])
def test_a_class_that_the_other_split_has_not(tree, split, other, asked):
    shutil.copytree(tree / f"folder/{split}/cat", tree / f"folder/{split}/ant")
    with pytest.raises(UserError, match=f"{split}: ant: not among the class folders of {other}"):
        load_dataset(FOLDER, tree, asked)


def test_a_split_without_folders(tree):
    shutil.rmtree(tree / "folder/test")
    with pytest.raises(UserError, match="test: no class folders: expected"):
        load_dataset(FOLDER, tree, "train")


def test_a_folder_without_anything(tmp_path):
    with pytest.raises(UserError, match="no class folders: put images at"):
        load_dataset(FOLDER, tmp_path, "train")


@pytest.mark.parametrize(
    ("name", "hint"),
    [("cifar01", "'cifar10'"), ("CIFAR10", "'cifar10'"), ("fashionmnist", "'fashion_mnist'"),
     ("xyzzy", "there are cifar10, cifar100, mnist")],
)  # fmt: skip
def test_an_unknown_name_gets_the_nearest(tmp_path, name, hint):
    with pytest.raises(UserError, match=hint):
        load_dataset(config_for(name), tmp_path, "train")


@pytest.mark.parametrize(("alias", "name"), [("cifar", "cifar10"), ("tiny", "tiny_imagenet")])
def test_aliases(alias, name):
    assert datasets.canonical_name(alias) == name


@pytest.mark.parametrize(
    ("name", "shape", "right"),
    [("cifar10", (3, 28, 28), "3, 32, 32"), ("mnist", (3, 28, 28), "1, 28, 28"),
     ("tiny", (3, 32, 32), "3, 64, 64"), ("digits", (1, 28, 28), "1, 8, 8")],
)  # fmt: skip
def test_a_shape_that_is_not_the_datasets(tmp_path, name, shape, right):
    with pytest.raises(UserError, match=rf"set network.image_shape to \[{right}\]"):
        load_dataset(config_for(name, shape), tmp_path, "train")


def test_a_shape_that_no_image_has(tree):
    with pytest.raises(UserError, match="1 or 3 channels"):
        load_dataset(config_for("folder", (2, 8, 8)), tree, "train")


def test_more_classes_are_an_error_and_fewer_a_note(tree, messages):
    with pytest.raises(UserError, match="has 2 classes, but classes is 1: set it to 2"):
        load_dataset(config_for("folder", (3, 8, 8), 1), tree, "train")
    for split in ("train", "test", "train"):
        load_dataset(config_for("folder", (3, 8, 8), 5), tree, split)
    assert messages == ["folder: 2 classes here, of the 5 that the config names"]


# --- official files


def test_digits_are_split_once_and_for_all(tmp_path):
    from sklearn.datasets import load_digits

    config = config_for("digits", (1, 8, 8))
    train, test = (load_dataset(config, tmp_path, split) for split in ("train", "test"))
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
    data = load_dataset(config_for("mnist", (1, 28, 28)), mnist, "train")
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
    sums = [(name, md5_of(packed) if name == packed.name else "") for name, _ in MNIST.resources]
    monkeypatch.setattr(MNIST, "resources", sums)
    data = load_dataset(config_for("mnist", (1, 28, 28)), mnist, "test")
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
        load_dataset(config_for("mnist", (1, 28, 28)), mnist, "train")


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
    sums = [[name, md5_of(folder / name)] for name in batches]
    monkeypatch.setattr(CIFAR10, "train_list", sums[:5])
    monkeypatch.setattr(CIFAR10, "test_list", sums[5:])
    meta_file = folder / CIFAR10.meta["filename"]
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5_of(meta_file)})
    with tarfile.open(tmp_path / CIFAR10.filename, "w:gz") as file:
        file.add(folder, CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5_of(tmp_path / CIFAR10.filename))
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:1/")
    monkeypatch.setattr(official, "CIFAR10_MIRROR", "http://127.0.0.1:1/")
    return data.reshape(60, 3, 32, 32)


def test_an_archive_put_there_by_hand_is_unpacked_and_read(cifar_archive, tmp_path):
    train = load_dataset(config_for("cifar10"), tmp_path, "train")
    (tmp_path / "cifar-10-python.tar.gz").unlink()
    test = load_dataset(config_for("cifar10"), tmp_path, "test")
    assert np.array_equal(np.concatenate((train.images, test.images)), cifar_archive)
    assert train.labels.tolist() == [*range(10)] * 5
    assert train.class_names[9] == "class 9"


def test_a_changed_batch_file_is_refused(cifar_archive, tmp_path):
    load_dataset(config_for("cifar10"), tmp_path, "train")
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"other")
    with pytest.raises(UserError, match="is not the original: remove this folder"):
        load_dataset(config_for("cifar10"), tmp_path, "test")


def test_a_dataset_that_is_not_there_and_cannot_be_downloaded(cifar_archive, tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").unlink()
    with pytest.raises(UserError, match="could not be downloaded") as error:
        load_dataset(config_for("cifar10"), tmp_path, "train")
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
    data = load_dataset(TINY, tiny, "test")
    assert data.name == "tiny_imagenet"
    assert data.labels.tolist() == [1, 0, 1]
    assert data.class_names == ["goldfish", "centipede"]
    assert [int(image.min()) for image in data.images] == [0, 100, 200]
    assert load_dataset(TINY, tiny, "train").labels.tolist() == [0, 1]


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
        load_dataset(TINY, tiny, "test")
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
    train = load_dataset(config_for("cifar10"), data_dir, "train")
    assert np.bincount(train.labels).tolist() == [5000] * 10
    levels = np.arange(256) / 255
    for channel, mean, deviation in ((0, 0.4914, 0.2470), (1, 0.4822, 0.2435), (2, 0.4465, 0.2616)):
        p = np.bincount(train.images[:, channel].ravel(), minlength=256) / (50_000 * 1024)
        assert round(p @ levels, 4) == mean
        assert round(np.sqrt(p @ levels**2 - (p @ levels) ** 2), 4) == deviation
    test = load_dataset(config_for("cifar10"), data_dir, "test")
    assert np.bincount(test.labels).tolist() == [1000] * 10


@pytest.mark.parametrize(("name", "train_size"), [("mnist", 17_000), ("fashion_mnist", 60_000)])
def test_mnist_and_fashion_mnist(real, name, train_size):
    data_dir = real("mnist", "FashionMNIST/raw/.unpacked")
    for split, size in (("train", train_size), ("test", 10_000)):
        data = load_dataset(config_for(name, (1, 28, 28)), data_dir, split)
        assert data.images.shape == (size, 1, 28, 28)
        assert set(data.labels.tolist()) == set(range(10))
    assert len(data.class_names) == 10


def test_twenty_classes_of_tiny_imagenet(real, messages):
    data_dir = real("tiny_imagenet", "tiny-imagenet-200/.unpacked")
    train, test = (load_dataset(TINY, data_dir, split) for split in ("train", "test"))
    assert np.bincount(train.labels).tolist() == [500] * 20
    assert np.bincount(test.labels).tolist() == [50] * 20
    images = np.concatenate((train.images, test.images))
    grey = (images == images[:, :1]).all(axis=(1, 2, 3))
    assert grey.sum() >= 158
    assert "goldfish" in train.class_names
    assert "tiny_imagenet: 20 classes here, of the 200 that the config names" in messages
