"""Sets of images that FID reads and writes: what comes back, and what bad input gets."""

import numpy as np
import pytest
from PIL import Image

from evaluation.fid.image_sets import export_images, read_images
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
