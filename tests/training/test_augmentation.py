"""Non-leaky augmentation: what is done, how well, and what the network is told about it."""

import math
from dataclasses import fields

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from training.augmentation import (
    LABELS,
    Transforms,
    augment,
    draw_transforms,
    labels,
    matrices,
    resample,
    transform,
)
from utils import generator

SHAPES = [(3, 32, 32), (1, 8, 8), (1, 28, 20), (3, 17, 24)]


def draw(*key) -> torch.Generator:
    return generator("cpu", "augmentation test", *key)


def transforms(n: int, **values: float) -> Transforms:
    """The same for each of n images; what is not named is left out."""
    none = {f.name: torch.zeros(n) for f in fields(Transforms)} | {"shift": torch.zeros(n, 2)}
    given = {k: torch.tensor(v, dtype=torch.float32).expand_as(none[k]) for k, v in values.items()}
    return Transforms(**none | given)


def random_images(n: int, shape=(3, 32, 32)) -> Tensor:
    return torch.rand((n, *shape), generator=draw("images")) * 2 - 1


def photographs() -> Tensor:
    """(24, 3, 32, 32) in [-1, 1]: pieces of the two photographs of scikit-learn, made small."""
    from sklearn.datasets import load_sample_images

    pieces = []
    for photograph in load_sample_images().images:
        x = torch.tensor(photograph).permute(2, 0, 1).float() / 127.5 - 1
        x = F.avg_pool2d(x[:, :384], 3)
        pieces += x.unfold(1, 32, 32).unfold(2, 32, 32).permute(1, 2, 0, 3, 4).flatten(0, 1)
    return torch.stack(pieces)[::2]


def from_centre(height: int, width: int) -> Tensor:
    """(3, height, width): x, y of every pixel from the centre, and 1."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    x, y = x - (width - 1) / 2, y - (height - 1) / 2
    return torch.stack([x, y, torch.ones_like(x)]).double()


def matrix_of_labels(label: list[float], height: int, width: int) -> Tensor:
    """The whole transform, (3, 3), by what the network is told and by the issue's definition."""
    x_flip, y_flip, a, cos_minus_1, sin, stretch_cos, stretch_sin, dx, dy = label

    def rotation(angle):
        cos, sin = math.cos(angle), math.sin(angle)
        return torch.tensor([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]], dtype=torch.float64)

    def scaling(x, y):
        return torch.tensor([x, y, 1], dtype=torch.float64).diag()

    size = math.copysign(math.hypot(stretch_cos, stretch_sin), stretch_cos)
    axis = math.atan(stretch_sin / stretch_cos) if size else 0
    stretch = scaling(2 ** (0.2 * size), 2 ** (-0.2 * size))
    moved = torch.eye(3, dtype=torch.float64)
    moved[:2, 2] = torch.tensor([dx * width / 8, dy * height / 8])
    matrix = scaling(1 - 2 * x_flip, 1 - 2 * y_flip)
    matrix = scaling(2 ** (0.2 * a), 2 ** (0.2 * a)) @ matrix
    matrix = rotation(math.atan2(sin, cos_minus_1 + 1)) @ matrix
    return moved @ rotation(axis) @ stretch @ rotation(-axis) @ matrix


# --- labels and what they stand for


@pytest.mark.parametrize("shape", SHAPES)
def test_labels_match_the_transform_applied(shape):
    """Cosines that the reflection at the borders continues for ever, so that the transformed image
    is known in closed form at every pixel, however far it moves."""
    n, (channels, height, width) = 12, shape
    here = from_centre(height, width)

    def cosines(points):
        x, y = (math.pi * (points[i] / (side - 1) + 0.5) for i, side in enumerate((width, height)))
        waves = [x.cos() + (k + 1) / 2 * y.cos() + (2 * x).cos() * y.cos() for k in range(channels)]
        return torch.stack(waves) / 3

    x0 = cosines(here).float().repeat(n, 1, 1, 1)
    x, label = augment(x0, 1.0, draw("labels", *shape))
    for i in range(n):
        matrix = matrix_of_labels(label[i].tolist(), height, width)
        before = torch.linalg.inv(matrix) @ here.flatten(1)
        expected = cosines(before.view_as(here)).float()
        torch.testing.assert_close(x[i], expected, rtol=0, atol=0.015)


def test_labels_determine_the_transform_and_are_zero_without_one():
    t = draw_transforms(500, 0.5, draw("determine"))
    told = labels(t)
    assert told.shape == (500, LABELS)
    flips = torch.stack([1 - 2 * t.x_flip, 1 - 2 * t.y_flip, torch.ones(500)], 1).diag_embed()
    applied = matrices(t, 20, 28) @ flips
    expected = torch.stack([matrix_of_labels(row, 20, 28) for row in told.tolist()]).float()
    torch.testing.assert_close(applied, expected, rtol=1e-4, atol=1e-5)
    identity = (applied == torch.eye(3)).flatten(1).all(1)
    assert torch.equal(identity, (told == 0).all(1))
    assert 5 < identity.sum() < 40  # 1 in 2 * 4/3 * 2^4


def test_labels_of_given_transforms():
    quarter = math.pi / 2
    t = transforms(1, x_flip=1, scale=-0.7, angle=quarter, stretch=2, axis=-quarter / 3)
    expected = [1, 0, -0.7, -1, 1, math.sqrt(3), -1, 0, 0]
    torch.testing.assert_close(labels(t), torch.tensor([expected]))
    t = transforms(2, y_flip=1, shift=[0.5, -2])
    assert labels(t).tolist() == [[0, 1, 0, 0, 0, 0, 0, 0.5, -2]] * 2


def test_each_part_is_drawn_as_often_as_it_should():
    n, prob = 40_000, 0.12
    told = labels(draw_transforms(n, prob, draw("often")))
    x_flip, y_flip, scale, cos_minus_1, sin, stretch_cos, stretch_sin, dx, dy = told.unbind(1)
    angle = torch.atan2(sin, cos_minus_1 + 1)
    stretched = stretch_cos != 0
    turned = stretch_sin != 0
    shares = {0.5: [x_flip], prob / 2: [y_flip, turned], prob: [scale, angle, stretched, dx, dy]}
    for share, parts in shares.items():
        for part in parts:
            error = (part != 0).double().mean() - share
            assert abs(error) < 4 * math.sqrt(share * (1 - share) / n)
    assert torch.equal(dx != 0, dy != 0)
    size = torch.hypot(stretch_cos, stretch_sin) * stretch_cos.sign()
    for a in (scale[scale != 0], size[stretched], dx[dx != 0], dy[dy != 0]):
        assert abs(a.mean()) < 0.06
        assert abs(a.std() - 1) < 0.05
    axis = torch.atan(stretch_sin / stretch_cos)[turned]
    for turn, half_circle in ((angle[angle != 0], math.pi), (axis, math.pi / 2)):
        quarters = torch.histc(turn, 4, -half_circle, half_circle) / len(turn)
        torch.testing.assert_close(quarters, torch.full((4,), 0.25), rtol=0, atol=0.04)
    assert abs(torch.corrcoef(torch.stack([dx, dy])[:, dx != 0])[0, 1]) < 0.06


def test_at_probability_0_nothing_happens():
    x0 = random_images(64)
    x, told = augment(x0, 0.0, draw("zero"))
    assert torch.equal(x, x0)
    assert told.shape == (64, LABELS)
    assert not told.any()


# --- what is drawn depends on the generator and the place in the batch


def test_draws_depend_only_on_the_generator():
    x0 = random_images(32)
    torch.manual_seed(1)
    x, told = augment(x0, 0.5, draw("same"))
    torch.manual_seed(2)
    again, told_again = augment(x0, 0.5, draw("same"))
    assert torch.equal(x, again)
    assert torch.equal(told, told_again)
    assert torch.equal(told, augment(-x0, 0.5, draw("same"))[1])
    assert not torch.equal(told, augment(x0, 0.5, draw("other"))[1])


def test_as_many_numbers_are_drawn_whatever_comes_out():
    states = []
    for prob in (1e-9, 0.3, 1.0):
        generator = draw("count")
        draw_transforms(7, prob, generator)
        states.append(generator.get_state())
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])


def test_shares_of_a_batch_are_the_batch():
    x0 = random_images(12)
    x, told = augment(x0, 0.6, draw("share"))
    for share in (slice(0, 4), slice(4, 12)):
        part, told_part = augment(x0[share], 0.6, draw("share"), 12, share)
        assert torch.equal(told_part, told[share])
        torch.testing.assert_close(part, x[share], rtol=0, atol=1e-5)


# --- what must be exact


@pytest.mark.parametrize("shape", SHAPES)
def test_untouched_and_flipped_images_keep_every_bit(shape):
    x0 = random_images(200, shape)
    x, told = augment(x0, 0.12, draw("bits"))
    only_flips = (told[:, 2:] == 0).all(1)
    seen = set()
    for i in only_flips.nonzero().flatten().tolist():
        flips = tuple(told[i, :2].tolist())
        seen.add(flips)
        axes = [axis for axis, flip in zip((-1, -2), flips, strict=True) if flip]
        assert torch.equal(x[i], x0[i].flip(axes))
    assert len(seen) == 4
    moved = ~only_flips
    assert 0.2 < moved.float().mean() < 0.6
    assert (x[moved] != x0[moved]).flatten(1).any(1).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_resampling_by_whole_pixels_is_exact(shape):
    height, width = shape[1:]
    x0 = random_images(4, shape)
    for right, down in ((3, -2), (-1, 0), (0, 5), (width // 2, 1)):
        t = transforms(4, shift=[8 * right / width, 8 * down / height])
        rows = reflected(torch.arange(height) - down, height)
        columns = reflected(torch.arange(width) - right, width)
        expected = x0[:, :, rows][..., columns]
        torch.testing.assert_close(transform(x0, t), expected, rtol=0, atol=2e-5)


def reflected(places: Tensor, n: int) -> Tensor:
    places = places.abs()
    return torch.where(places < n, places, 2 * (n - 1) - places)


def test_resampling_by_a_flip_or_by_nothing_is_exact():
    x0 = random_images(4)
    for x, y in ((1, 1), (-1, 1), (1, -1), (-1, -1)):
        matrix = torch.tensor([x, y, 1.0]).diag().repeat(4, 1, 1)
        axes = [axis for axis, sign in ((-1, x), (-2, y)) if sign < 0]
        torch.testing.assert_close(resample(x0, matrix), x0.flip(axes), rtol=0, atol=2e-5)


def test_quarter_turns_are_exact():
    x0 = random_images(4)
    for turns in (-1, 1, 2):
        x = transform(x0, transforms(4, angle=turns * math.pi / 2))
        torch.testing.assert_close(x, x0.rot90(-turns, (2, 3)), rtol=0, atol=5e-5)
    oblong = random_images(2, (1, 28, 20))
    x = transform(oblong, transforms(2, angle=math.pi / 2))
    torch.testing.assert_close(
        x[:, :, 4:24], oblong[:, :, 4:24].rot90(-1, (2, 3)), rtol=0, atol=5e-5
    )


# --- the quality of what cannot be


def round_trip_error(x0: Tensor, **values: float) -> float:
    """Root mean square, in the middle 16 x 16, of applying a transform and its inverse."""
    matrix = matrices(transforms(len(x0), **values), *x0.shape[-2:])
    x = resample(resample(x0, matrix), torch.linalg.inv(matrix))
    return (x - x0)[..., 8:24, 8:24].square().mean().sqrt().item()


@pytest.mark.parametrize("degrees", [10, 45, 77, 153])
def test_a_rotation_and_its_inverse_return_the_image(degrees):
    x, y, _ = from_centre(32, 32).float()
    smooth = ((x / 4).sin() * (y / 5).cos())[None, None]
    assert round_trip_error(smooth, angle=math.radians(degrees)) < 0.0025
    assert round_trip_error(photographs(), angle=math.radians(degrees)) < 0.03


def test_every_other_part_and_its_inverse_return_the_image():
    x0 = photographs()
    assert round_trip_error(x0, scale=1.0) < 0.01
    assert round_trip_error(x0, stretch=1.0, axis=0.6) < 0.03
    assert round_trip_error(x0, shift=[0.1, 0.3]) < 0.03


def test_what_a_smaller_scale_lifts_beyond_the_band_does_not_fold_back():
    x, _, _ = from_centre(32, 32).float()
    wave = (2 * math.pi * 0.45 * x)[None, None].cos()  # 0.45 periods per pixel
    smaller = transform(wave, transforms(1, scale=-3.0))  # 0.68, which would look like 0.32
    assert smaller[..., 8:24].std() < 0.1 * wave.std()


def test_a_larger_scale_keeps_contrast():
    x, _, _ = from_centre(32, 32).float()
    wave = (2 * math.pi * 0.3 * x)[None, None].cos()
    larger = transform(wave, transforms(1, scale=3.0))
    expected = (2 * math.pi * 0.3 * x / 2**0.6)[None, None].cos()
    torch.testing.assert_close(larger[..., 8:24], expected[..., 8:24], rtol=0, atol=0.1)
