"""Class folders: exact pixels, the array kept beside them, and what bad input gets."""

import shutil
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest
from data_helpers import config_for, random_pixels
from PIL import Image

import datasets
from config import parse_config
from datasets import Dataset, read_dataset, stratified, stratified_subset
from readers import image_files
from support.errors import UserError

FOLDER = config_for("folder", (3, 8, 8), classes=2)


def stored(root: Path) -> list[str]:
    cache = root / ".cache"
    return sorted(path.name for path in cache.iterdir()) if cache.exists() else []


def forbid_decoding(monkeypatch, but: Collection[str] = ()) -> None:
    """`but`: the names of files that may be tried."""
    decode = image_files.decode

    def fail(path, shape):
        assert Path(path).name in but, "decoded again"
        return decode(path, shape)

    monkeypatch.setattr(image_files, "decode", fail)


# --- class folders


def test_class_folders_keep_every_pixel_in_alphabetical_order(tree):
    (tree / "folder" / "train" / ".hidden").mkdir()
    (tree / "folder" / "train" / "cat" / ".DS_Store").write_text("hidden")
    data = read_dataset(FOLDER, tree, "train")
    paths = [tree / "folder/train" / c / f"{i}.png" for c in ("cat", "dog") for i in range(3)]
    expected = np.stack([np.asarray(Image.open(path)).transpose(2, 0, 1) for path in paths])
    assert np.array_equal(data.images, expected)
    assert data.images.dtype == np.uint8
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.labels.dtype == np.int64
    assert data.class_names == ["cat", "dog"]
    assert (data.name, data.split, len(data)) == ("folder", "train", 6)


def test_data_dir_itself_may_hold_the_class_folders(tree):
    assert len(read_dataset(FOLDER, tree / "folder", "test")) == 6


def test_class_folders_win_over_official_files(tree):
    (tree / "folder").rename(tree / "digits")
    data = read_dataset(config_for("digits", (1, 8, 8)), tree, "train")
    assert data.class_names == ["cat", "dog"]
    assert data.images.shape == (6, 1, 8, 8)


def test_images_are_decoded_once(tree, monkeypatch):
    first = read_dataset(FOLDER, tree, "train")
    forbid_decoding(monkeypatch)
    second = read_dataset(FOLDER, tree, "train")
    assert isinstance(second.images, np.memmap)
    assert not second.images.flags.writeable
    assert np.array_equal(first.images, second.images)
    moved = tree.rename(tree.with_name("moved"))
    assert len(read_dataset(FOLDER, moved, "train")) == 6


@pytest.mark.parametrize("change", ["pixels", "added", "removed", "renamed"])
def test_the_array_is_renewed_when_files_change(tree, change):
    before = read_dataset(FOLDER, tree, "train")
    old = np.array(before.images)
    read_dataset(FOLDER, tree, "test")
    file = tree / "folder/train/cat/0.png"
    if change == "pixels":
        Image.fromarray(random_pixels()).save(file)
    elif change == "added":
        Image.fromarray(random_pixels()).save(file.with_name("3.png"))
    elif change == "removed":
        file.unlink()
    else:
        file.rename(file.with_name("9.png"))
    after = read_dataset(FOLDER, tree, "train")
    assert not np.array_equal(after.images, old)
    assert np.array_equal(before.images, old), "an array in use must not change"
    kinds = [name.split("-")[0] + Path(name).suffix for name in stored(tree / "folder")]
    assert kinds == ["test.json", "test.npy", "train.json", "train.npy"], "an old one was left"


def test_each_shape_has_its_own_array(tree):
    small = config_for("folder", (1, 4, 4), classes=2)
    assert read_dataset(FOLDER, tree, "train").images.shape == (6, 3, 8, 8)
    assert read_dataset(small, tree, "train").images.shape == (6, 1, 4, 4)
    assert len(stored(tree / "folder")) == 4


def test_a_damaged_array_is_decoded_again(tree):
    first = np.array(read_dataset(FOLDER, tree, "train").images)
    (array,) = (tree / "folder/.cache").glob("*.npy")
    array.write_bytes(array.read_bytes()[:200])
    assert np.array_equal(read_dataset(FOLDER, tree, "train").images, first)


def test_a_full_disk_costs_only_the_kept_array(tree, monkeypatch, messages):
    def full(file, images):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    assert read_dataset(FOLDER, tree, "train").images.shape == (6, 3, 8, 8)
    assert "No space left on device" in messages[0]
    assert stored(tree / "folder") == []


def test_the_fingerprint_follows_pixels_and_labels(tree):
    data = read_dataset(FOLDER, tree, "train")
    images, labels = np.array(data.images), data.labels.copy()
    same = datasets.Dataset("other", "test", images, labels, [])
    assert same.fingerprint() == data.fingerprint()
    images[0, 0, 0, 0] ^= 1
    changed = same.fingerprint()
    assert changed != data.fingerprint()
    labels[0] = 1
    assert same.fingerprint() not in (changed, data.fingerprint())


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
        read_dataset(FOLDER, tree, "train")
    lines = str(error.value).splitlines()
    assert len(lines) == 2
    assert "4 of 10 files" in lines[0]
    assert "train/cat/empty.png (not an image)" in lines[0]
    assert "train/cat/notes.txt (not an image)" in lines[0]
    assert "and 1 more" in lines[0]
    assert "--skip_bad_images" in lines[1]
    assert stored(tree / "folder") == []


def test_bad_files_are_left_out_on_request_only(tree, messages, monkeypatch):
    good = np.array(read_dataset(FOLDER, tree, "train").images)
    spoil(tree)
    data = read_dataset(FOLDER, tree, "train", skip_bad_images=True)
    assert np.array_equal(data.images, good)
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert "4 of 10 files" in messages[0]
    forbid_decoding(monkeypatch, but=("notes.txt", "empty.png", "link.png", "cut.png"))
    again = read_dataset(FOLDER, tree, "train", skip_bad_images=True)
    assert np.array_equal(again.images, good)
    assert len(messages) == 2, "the warning is repeated at every start"
    with pytest.raises(UserError, match="4 of 10 files"):
        read_dataset(FOLDER, tree, "train")


def test_a_class_without_any_readable_image(tree):
    for file in (tree / "folder/train/dog").iterdir():
        file.write_text("foreign")
    with pytest.raises(UserError, match="no readable image of class dog"):
        read_dataset(FOLDER, tree, "train", skip_bad_images=True)


@pytest.mark.parametrize("change", ["shape", "bad", "json", "dtype"])
def test_a_kept_array_that_does_not_fit_its_note_is_made_anew(tree, messages, change):
    first = np.array(read_dataset(FOLDER, tree, "train").images)
    (array,), (note,) = ((tree / "folder/.cache").glob(f"*.{end}") for end in ("npy", "json"))
    if change == "shape":
        np.save(array, first[:4])
    elif change == "dtype":
        np.save(array, first.astype(np.float32))
    else:
        note.write_text('{"bad": {"2": "gone"}}' if change == "bad" else '["bad"]')
    assert np.array_equal(read_dataset(FOLDER, tree, "train").images, first)
    if change != "bad":  # of which the file can be read
        assert "is damaged, or of something else, and is left aside" in messages[0]


# --- folders, names, shapes and classes that do not fit


def test_an_empty_class_folder(tree):
    (tree / "folder/train/ant").mkdir()
    (tree / "folder/test/ant").mkdir()
    with pytest.raises(UserError, match="train/ant: no images"):
        read_dataset(config_for("folder", (3, 8, 8), 3), tree, "train")


@pytest.mark.parametrize(("split", "other"), [("train", "test"), ("test", "train")])
@pytest.mark.parametrize("asked", ["train", "test"])
def test_a_class_that_the_other_split_has_not(tree, split, other, asked):
    shutil.copytree(tree / f"folder/{split}/cat", tree / f"folder/{split}/ant")
    with pytest.raises(UserError, match=f"{split}: ant: not among the class folders of {other}"):
        read_dataset(FOLDER, tree, asked)


def test_a_split_without_folders(tree):
    shutil.rmtree(tree / "folder/test")
    with pytest.raises(UserError, match="test: no class folders: expected"):
        read_dataset(FOLDER, tree, "train")


def test_a_folder_without_anything(tmp_path):
    with pytest.raises(UserError, match="no class folders: put images at"):
        read_dataset(FOLDER, tmp_path, "train")


@pytest.mark.parametrize(
    ("name", "hint"),
    [("cifar01", "'cifar10'"), ("CIFAR10", "'cifar10'"), ("fashionmnist", "'fashion_mnist'"),
     ("xyzzy", "there are cifar10, cifar100, mnist")],
)  # fmt: skip
def test_an_unknown_name_gets_the_nearest(tmp_path, name, hint):
    with pytest.raises(UserError, match=hint):
        read_dataset(config_for(name), tmp_path, "train")


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
        read_dataset(config_for(name, shape), tmp_path, "train")


def test_a_shape_that_no_image_has(tree):
    with pytest.raises(UserError, match="1 or 3 channels"):
        read_dataset(config_for("folder", (2, 8, 8)), tree, "train")


def test_more_classes_are_an_error_and_fewer_a_note(tree, messages):
    with pytest.raises(UserError, match="has 2 classes, but classes is 1: set it to 2"):
        read_dataset(config_for("folder", (3, 8, 8), 1), tree, "train")
    for split in ("train", "test", "train"):
        read_dataset(config_for("folder", (3, 8, 8), 5), tree, split)
    assert messages == ["folder: 2 classes here, of the 5 that the config names"]


def test_a_class_conditional_network_needs_the_true_number_of_classes(tree):
    config = parse_config(
        {**config_for("folder", (3, 8, 8), 5).model_dump(), "cond_drop_prob": 0.1}
    )
    with pytest.raises(UserError, match=r"has 2 classes here.*set it to 2"):
        read_dataset(config, tree, "train")


# --- parts of a dataset


def test_subsets_are_stratified_and_nested():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [100, 50, 2]))
    small, large = (stratified_subset(labels, n, seed=0) for n in (15, 60))
    assert set(small) < set(large)
    assert np.bincount(labels[small]).tolist() == [9, 5, 1]
    balanced = np.arange(500) % 10
    assert (np.bincount(balanced[stratified_subset(balanced, 70, seed=0)]) == 7).all()
    assert np.bincount(labels[stratified_subset(labels, 3, 0)]).tolist() == [1, 1, 1]
    assert len(stratified_subset(labels, 152, 0)) == 152
    assert not np.array_equal(small, stratified_subset(labels, 15, seed=1))
    images = np.arange(152, dtype=np.uint8).reshape(152, 1, 1, 1)
    dataset = Dataset("numbered", "train", images, labels, ["a", "b", "c"])
    assert np.array_equal(stratified(dataset, 15, 0).images.flatten(), small)
    assert np.array_equal(stratified(dataset, 15, 0).labels, labels[small])
    assert stratified(dataset, None, 0) is dataset
    for n in (2, 153):
        with pytest.raises(UserError, match=f"--n_train {n}: give 3 .* to 152 "):
            stratified_subset(labels, n, 0)
