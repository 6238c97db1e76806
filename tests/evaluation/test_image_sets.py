"""Sets of images that FID reads and writes: what comes back, and what bad input gets."""

import os

import numpy as np
import pytest
from PIL import Image

from evaluation.fid.image_sets import export_images, read_images, score_file
from readers.image_files import decode
from support.errors import UserError


def pixels(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_a_folder_is_read_sorted_in_any_format_and_other_files_are_left(tmp_path):
    a, b, c = pixels(3, 6, 5, 3)
    Image.fromarray(c).save(tmp_path / "c.PNG")
    Image.fromarray(a).save(tmp_path / "a.bmp")
    Image.fromarray(b[:, :, 0]).save(tmp_path / "b.tiff")
    (tmp_path / "samples.json").write_text("{}")
    images = read_images(tmp_path)
    assert images.shape == (3, 3, 6, 5)
    np.testing.assert_array_equal(images[0], a.transpose(2, 0, 1))
    np.testing.assert_array_equal(images[1], np.stack([b[:, :, 0]] * 3))
    np.testing.assert_array_equal(images[2], c.transpose(2, 0, 1))


def test_an_npz_is_read_in_either_layout_and_from_arr_0_among_others(tmp_path):
    images = pixels(4, 3, 6, 5)
    labels = np.arange(4)
    np.savez(tmp_path / "nchw.npz", pictures=images)
    np.savez_compressed(tmp_path / "nhwc.npz", images.transpose(0, 2, 3, 1), labels)
    for name in ("nchw.npz", "nhwc.npz"):
        np.testing.assert_array_equal(read_images(tmp_path / name), images)


@pytest.mark.parametrize("shape", [(3, 6, 5), (1, 6, 5)])
def test_exported_images_come_back_as_they_were(tmp_path, shape):
    images = pixels(11, *shape)
    export_images(images, tmp_path / "new")
    np.testing.assert_array_equal(read_images(tmp_path / "new")[:, : shape[0]], images)
    with pytest.raises(UserError, match="empty"):
        export_images(images, tmp_path / "new")


def make_bad_set(tmp_path, kind):
    folder = tmp_path / kind
    npz = tmp_path / f"{kind}.npz"
    if kind in ("empty", "nested", "corrupt", "sizes"):
        export_images(pixels(3, 3, 8, 8), folder / "pngs" if kind == "nested" else folder)
    if kind == "empty":
        [file.unlink() for file in folder.iterdir()]
    elif kind == "corrupt":
        (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:60])
    elif kind == "sizes":
        Image.new("RGB", (9, 8)).save(folder / "2.png")
    elif kind == "floats":
        np.savez(npz, np.zeros((2, 3, 8, 8)))
    elif kind == "flat":
        np.savez(npz, np.zeros((2, 64), np.uint8))
    elif kind == "unnamed":
        np.savez(npz, a=np.zeros((2, 3, 8, 8), np.uint8), b=np.zeros(2))
    elif kind == "damaged":
        np.savez(npz, pixels(3, 3, 8, 8))
        data = bytearray(npz.read_bytes())
        data[300] ^= 0xFF
        npz.write_bytes(data)
    elif kind == "truncated":
        np.savez(npz, pixels(3, 3, 8, 8))
        npz.write_bytes(npz.read_bytes()[:200])
    elif kind == "text":
        (tmp_path / "text").write_text("images")
    return npz if npz.exists() else folder


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("absent", "no such"), ("empty", "no images"), ("nested", r"did you mean .*pngs"),
        ("corrupt", r"1\.png"), ("sizes", r"2\.png.* 8x9, but .* 8x8"), ("floats", "float64"),
        ("flat", r"\(2, 64\)"), ("unnamed", "a, b"), ("damaged", "cannot be read"),
        ("truncated", "truncated"), ("text", "expected a folder"),
    ],
)  # fmt: skip
def test_a_bad_set_is_explained(tmp_path, kind, message):
    with pytest.raises(UserError, match=message) as error:
        read_images(make_bad_set(tmp_path, kind))
    assert kind in str(error.value)


def test_one_reader_for_samples_and_datasets(tmp_path, messages):
    """16 bits, transparency and a turned photo; pytorch-fid would see them otherwise."""
    rgba = pixels(8, 8, 4)
    rgba[:4, :, 3] = 0
    Image.fromarray(rgba).save(tmp_path / "a.png")
    Image.fromarray(np.full((8, 8), 257 * 90, np.uint16)).save(tmp_path / "b.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels(8, 8, 3)).save(tmp_path / "c.png", exif=exif)
    Image.fromarray(pixels(8, 8, 3)).save(tmp_path / "d.png")
    images = read_images(tmp_path)
    assert (images[0, :, :4] == 255).all()
    assert (images[1] == 90).all()
    for image, name in zip(images, "abcd", strict=True):
        np.testing.assert_array_equal(image, decode(str(tmp_path / f"{name}.png"), (3, 8, 8)))
    (message,) = messages
    assert "pytorch-fid would see other pixels in 3 of 4 images" in message


def test_pixels_of_unknown_range_and_pipes_are_no_samples(tmp_path):
    Image.new("F", (8, 8), 0.5).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"a\.tif: .*whose range is unknown"):
        read_images(tmp_path)
    (tmp_path / "a.tif").unlink()
    os.mkfifo(tmp_path / "b.png")
    with pytest.raises(UserError, match="no images here"):
        read_images(tmp_path)
    os.mkfifo(tmp_path / "b.npz")
    with pytest.raises(UserError, match=r"no such folder or \.npz file"):
        read_images(tmp_path / "b.npz")


def test_images_go_where_they_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"not an empty folder|could not be written"):
            export_images(pixels(2, 3, 8, 8), place)


@pytest.mark.parametrize(("path", "name"), [
    ("run/EMAgenerated_ep59_ddim_steps100_eta0.0/pngs", "fid_ep59_ddim_steps100_eta0.0.json"),
    ("run/mine/pngs", "fid_mine.json"), ("run/v1.5", "fid_v1.5.json"), ("a.npz", "fid_a.json"),
])  # fmt: skip
def test_the_score_of_a_set_has_its_name(tmp_path, path, name):
    path = tmp_path / path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch() if path.suffix == ".npz" else path.mkdir()
    assert score_file(path) == path.parent / name
    assert score_file(path, tmp_path / "out") == tmp_path / "out" / name
