"""Batches by position: what is in them depends on the seed and the step alone."""

import numpy as np
import pytest
import torch

from datasets import Batches, to_model_range, to_uint8

CPU = torch.device("cpu")


def numbered(n: int = 100, size: int = 6):
    """Image i is filled with the value i, except for its first column, which is 255."""
    images = np.tile(np.arange(n, dtype=np.uint8)[:, None, None, None], (1, 1, size, size))
    images[..., 0] = 255
    return images, np.arange(n)


def test_range_and_its_inverse():
    values = torch.arange(256, dtype=torch.uint8)
    x = to_model_range(values)
    assert (x[0], x[-1]) == (-1, 1)
    assert torch.equal(to_uint8(x), values)
    assert to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


def test_an_epoch_holds_every_image_once_in_an_order_of_its_own():
    batches = Batches(*numbered(), 7, CPU, seed=1, shuffle=True)
    per_epoch = batches.steps_per_epoch
    assert per_epoch == 15
    orders = [
        torch.cat([batches[e * per_epoch + i][1] for i in range(per_epoch)]).tolist()
        for e in range(2)
    ]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(100))
    assert orders[0] != orders[1] != list(range(100))


def test_drop_last():
    assert Batches(*numbered(), 7, CPU, drop_last=True).steps_per_epoch == 14


def test_any_step_can_be_read_without_those_before():
    options = {"shuffle": True, "flip": True, "crop_padding": 2}
    whole = Batches(*numbered(), 8, CPU, seed=5, **options)
    in_order = [whole[i] for i in range(40)]
    fresh = Batches(*numbered(), 8, CPU, seed=5, **options)
    for step in (39, 0, 17):
        for a, b in zip(fresh[step], in_order[step], strict=True):
            assert torch.equal(a, b)
    other = Batches(*numbered(), 8, CPU, seed=6, **options)
    assert not torch.equal(other[0][1], in_order[0][1])


@pytest.mark.parametrize("n", [2, 4])
def test_the_parts_of_several_processes_make_up_the_batch_of_one(n):
    options = {"seed": 5, "shuffle": True, "flip": True, "crop_padding": 2, "drop_last": True}
    whole = Batches(*numbered(), 8, CPU, **options)
    each = 8 // n
    parts = [
        Batches(*numbered(), 8, CPU, **options, part=slice(i * each, (i + 1) * each))
        for i in range(n)
    ]
    for step in (0, 13):
        x, y = zip(*(part[step] for part in parts), strict=True)
        assert torch.equal(torch.cat(x), whole[step][0])
        assert torch.equal(torch.cat(y), whole[step][1])


def test_about_half_of_the_images_are_flipped():
    batches = Batches(*numbered(), 100, CPU, flip=True)
    x, _ = batches[0]
    left, right = x[:, 0, 0, 0] == 1, x[:, 0, 0, -1] == 1
    assert torch.equal(left, ~right)
    assert 30 < right.sum() < 70


def test_a_crop_is_a_shift_with_black_from_outside():
    draw = np.random.default_rng(0)
    images = draw.integers(1, 256, (64, 3, 8, 8), dtype=np.uint8)
    batches = Batches(images, np.zeros(64, np.int64), 64, CPU, crop_padding=2)
    x, _ = batches[0]
    padded = np.pad(images, ((0, 0), (0, 0), (2, 2), (2, 2)))
    shifts = set()
    for i, crop in enumerate(to_uint8(x).numpy()):
        found = [
            (top, left)
            for top in range(5)
            for left in range(5)
            if np.array_equal(crop, padded[i, :, top : top + 8, left : left + 8])
        ]
        assert len(found) == 1
        shifts |= set(found)
    assert len(shifts) > 12  # of 25


def test_unshuffled_batches_keep_the_order():
    batches = Batches(*numbered(10), 4, CPU)
    assert [batches[i][1].tolist() for i in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


@pytest.mark.parametrize("n", [1, 3])
def test_shapes_and_types(n):
    images = np.zeros((5, n, 6, 6), np.uint8)
    x, y = Batches(images, np.zeros(5, np.int64), 2, CPU)[0]
    assert (x.shape, x.dtype, y.dtype) == ((2, n, 6, 6), torch.float32, torch.int64)
