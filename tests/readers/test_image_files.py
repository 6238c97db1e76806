"""One image file, of whatever mode and size, as an array of the network's shape."""

from pathlib import Path

import numpy as np
import pytest
from data_helpers import random_pixels
from PIL import Image

from readers import image_files


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


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_of_unknown_range_are_refused(tmp_path, mode):
    Image.new(mode, (8, 8), 70000).save(tmp_path / "a.tif")
    with pytest.raises(image_files.UnreadableImage, match="range is unknown"):
        image_files.decode(str(tmp_path / "a.tif"), (3, 8, 8))
