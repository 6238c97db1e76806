"""What lies in class folders beside images, and folders that are nearly right."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from data_helpers import config_for, random_pixels
from PIL import Image, ImageFile

from datasets import read_dataset
from support.errors import UserError

FOLDER = config_for("folder", (3, 8, 8), classes=2)


def litter(tree: Path) -> None:
    """What systems leave, in a class and beside the classes."""
    for folder in (tree / "folder/train", tree / "folder/train/cat"):
        (folder / "__MACOSX").mkdir()
        for name in ("Thumbs.db", "desktop.ini", ".DS_Store", "._0.png"):
            (folder / name).write_text("litter")


def test_what_systems_leave_in_folders_is_no_class_and_no_image(tree, messages):
    good = np.array(read_dataset(FOLDER, tree, "train").images)
    litter(tree)
    assert np.array_equal(read_dataset(FOLDER, tree, "train").images, good)
    assert messages == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_what_is_no_file_of_a_class_is_left_out_and_said(tree, messages):
    """A named pipe would be waited for, for ever; a link that leads back would have no end."""
    good = np.array(read_dataset(FOLDER, tree, "train").images)
    train = tree / "folder/train"
    (train / "cat/more").mkdir()
    (train / "cat/back").symlink_to(train)
    os.mkfifo(train / "dog/pipe.png")
    Image.fromarray(random_pixels()).save(train / "loose.png")
    for _ in range(2):
        assert np.array_equal(read_dataset(FOLDER, tree, "train").images, good)
    (message,) = messages
    assert f"{train}: left out" in message
    assert "loose.png, cat/back, cat/more, and 1 more" in message


@pytest.mark.parametrize("where", ["train/cat/loop.png", "train/loop"])
def test_a_link_to_itself(tree, messages, where):
    link = tree / "folder" / where
    link.symlink_to(link)
    if where == "train/loop":  # beside the classes: it is none of them
        assert len(read_dataset(FOLDER, tree, "train")) == 6
        assert "loop" in messages[0]
    else:
        with pytest.raises(UserError, match=r"loop\.png \(Too many levels of symbolic links\)"):
            read_dataset(FOLDER, tree, "train")


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX permissions")
def test_a_class_that_may_not_be_read(tree):
    """In a process without root's rights, which may read everything."""
    (tree / "folder/train/cat").chmod(0)
    code = (
        "import os, sys; from pathlib import Path; from readers.image_files import list_folder\n"
        "from support.errors import UserError\n"
        "if os.geteuid() == 0: os.seteuid(65534)\n"
        "try: list_folder(Path(sys.argv[1]))\n"
        "except UserError as error: print(error)"
    )
    for folder in [tree, *tree.parents][:3]:
        folder.chmod(0o755)
    command = [sys.executable, "-c", code, str(tree / "folder/train/cat")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    (tree / "folder/train/cat").chmod(0o755)
    assert "train/cat: cannot be read (Permission denied)" in result.stdout


@pytest.mark.parametrize("error", [AttributeError, TypeError, ZeroDivisionError, MemoryError])
def test_whatever_a_decoder_raises_is_that_files_fault(tree, error, monkeypatch):
    """By a format of our own, whose decoder raises it."""

    class Broken(ImageFile.ImageFile):
        format = "BROKEN"

        def _open(self):
            self._size, self._mode = (8, 8), "RGB"

        def load(self):
            raise error("out of the decoder")

    Image.init()  # else what PIL registers at its first image goes into these copies and is lost
    monkeypatch.setattr(Image, "ID", [*Image.ID, "BROKEN"])
    broken = (Broken, lambda prefix: prefix.startswith(b"BROKEN"))
    monkeypatch.setattr(Image, "OPEN", Image.OPEN | {"BROKEN": broken})
    (tree / "folder/train/cat/a.broken").write_bytes(b"BROKEN" * 10)
    with pytest.raises(UserError, match=r"1 of 7 .*cat/a\.broken \(out of the decoder\)"):
        read_dataset(FOLDER, tree, "train")
    assert len(read_dataset(FOLDER, tree, "train", skip_bad_images=True)) == 6


def test_a_file_that_can_be_read_again_is_no_longer_left_out(tree, monkeypatch):
    opened = Image.open

    def fails(path):
        if str(path).endswith("cat/1.png"):
            raise OSError(errno.EIO, "Input/output error")
        return opened(path)

    monkeypatch.setattr(Image, "open", fails)
    for _ in range(2):
        assert len(read_dataset(FOLDER, tree, "train", skip_bad_images=True)) == 5
    monkeypatch.undo()
    assert len(read_dataset(FOLDER, tree, "train")) == 6


@pytest.mark.parametrize(("split", "called"), [
    ("test", "val"), ("test", "Validation"), ("train", "Train"), ("train", "training"),
])  # fmt: skip
def test_a_split_of_another_name_gets_a_hint(tree, split, called):
    (tree / "folder" / split).rename(tree / "folder" / called)
    with pytest.raises(UserError, match=rf"folder/{called}: rename it to {split}$"):
        read_dataset(FOLDER, tree, "train")
    other = "test" if split == "train" else "train"
    (tree / "folder" / other).rename(tree / "folder" / other.capitalize())
    with pytest.raises(UserError, match="rename it to train"):
        read_dataset(FOLDER, tree, "test")
    (tree / "folder").rename(tree / "digits")
    with pytest.raises(UserError, match="rename it to train"):
        read_dataset(config_for("digits", (1, 8, 8)), tree, "test")
