"""Batches by position: what is in them depends on the seed and the step alone."""

import gc
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch

import datasets
from datasets import Batches, Batching, Dataset, fits_on, to_model_range, to_uint8

CPU = torch.device("cpu")


def numbered(n: int = 100, size: int = 8):
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
    batches = Batches(*numbered(), 7, CPU, Batching(1, shuffle=True))
    per_epoch = batches.steps_per_epoch
    assert per_epoch == 15
    orders = [
        torch.cat([batches[e * per_epoch + i][1] for i in range(per_epoch)]).tolist()
        for e in range(2)
    ]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(100))
    assert orders[0] != orders[1] != list(range(100))


def test_drop_last():
    assert Batches(*numbered(), 7, CPU, Batching(drop_last=True)).steps_per_epoch == 14


def test_any_step_can_be_read_without_those_before():
    how = Batching(5, shuffle=True, flip=True, crop=True)
    whole = Batches(*numbered(), 8, CPU, how)
    in_order = [whole[i] for i in range(40)]
    fresh = Batches(*numbered(), 8, CPU, how)
    for step in (39, 0, 17):
        for a, b in zip(fresh[step], in_order[step], strict=True):
            assert torch.equal(a, b)
    other = Batches(*numbered(), 8, CPU, replace(how, seed=6))
    assert not torch.equal(other[0][1], in_order[0][1])


@pytest.mark.parametrize("n", [2, 4])
def test_the_parts_of_several_processes_make_up_the_batch_of_one(n):
    how = Batching(5, shuffle=True, flip=True, crop=True, drop_last=True)
    whole = Batches(*numbered(), 8, CPU, how)
    each = 8 // n
    parts = [Batches(*numbered(), 8, CPU, how, slice(i * each, (i + 1) * each)) for i in range(n)]
    for step in (0, 13):
        x, y = zip(*(part[step] for part in parts), strict=True)
        assert torch.equal(torch.cat(x), whole[step][0])
        assert torch.equal(torch.cat(y), whole[step][1])


def test_about_half_of_the_images_are_flipped():
    batches = Batches(*numbered(), 100, CPU, Batching(flip=True))
    x, _ = batches[0]
    left, right = x[:, 0, 0, 0] == 1, x[:, 0, 0, -1] == 1
    assert torch.equal(left, ~right)
    assert 30 < right.sum() < 70


@pytest.mark.parametrize("encoded", [False, True])
def test_a_crop_is_a_shift_with_black_from_outside(encoded):
    draw = np.random.default_rng(0)
    images = draw.integers(1, 256, (64, 3, 16, 16), dtype=np.uint8)
    given = (images / 127.5 - 1).astype(np.float16) if encoded else images
    batches = Batches(given, np.zeros(64, np.int64), 64, CPU, Batching(crop=True))
    x, _ = batches[0]
    padded = np.pad(images, ((0, 0), (0, 0), (2, 2), (2, 2)))
    shifts = set()
    for i, crop in enumerate(to_uint8(x).numpy()):
        found = [
            (top, left)
            for top in range(5)
            for left in range(5)
            if np.array_equal(crop, padded[i, :, top : top + 16, left : left + 16])
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


@pytest.fixture
def large(tmp_path):
    """A sparse memory map of 1 GB, of which image 7 is filled with 9."""
    shape = (1 << 14, 1, 256, 256)
    images = np.memmap(tmp_path / "images", np.uint8, "w+", shape=shape)
    images[7] = 9
    images.flush()
    return np.memmap(tmp_path / "images", np.uint8, "r", shape=shape)


def peak_bytes(act) -> int:
    tracemalloc.start()  # numpy counts there what it allocates
    act()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_of_a_memory_map_only_the_rows_of_a_batch_are_read(large):
    batches = Batches(large, np.arange(len(large)), 4, CPU)
    seen = []
    assert peak_bytes(lambda: seen.append(batches[1])) < 2e6
    ((x, y),) = seen
    assert y.tolist() == [4, 5, 6, 7]
    assert to_uint8(x).amax(dim=(1, 2, 3)).tolist() == [0, 0, 0, 9]
    assert peak_bytes(lambda: Batches(large, np.zeros(len(large)), 4, CPU)) < 2e6


def test_a_fingerprint_reads_a_part_at_a_time_and_all_of_it():
    images = np.random.default_rng(0).integers(0, 256, (9000, 1, 8, 8), dtype=np.uint8)
    data = Dataset("toy", "train", images[::2], np.arange(4500), [])  # rows that lie apart
    assert peak_bytes(data.fingerprint) < 0.99 * data.images.nbytes
    found = {data.fingerprint()}
    for place in (0, 4499):
        other = data.images.copy()
        other[place, 0, 7, 7] ^= 1
        found.add(replace(data, images=other).fingerprint())
    assert len(found) == 3
    assert replace(data, images=data.images.copy()).fingerprint() in found


def test_an_array_goes_to_a_gpu_where_it_takes_a_small_part_of_its_free_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 8000))
    cuda = torch.device("cuda:0")
    assert fits_on(cuda, 250)
    assert not fits_on(cuda, 251)
    assert not fits_on(CPU, 1)


def test_a_copy_of_latents_holds_their_values(monkeypatch):
    monkeypatch.setattr(datasets, "fits_on", lambda device, n_bytes: True)
    latents = np.random.default_rng(0).normal(size=(10, 4, 2, 2)).astype(np.float16)
    x0, _ = Batches(latents, np.arange(10), 10, CPU)[0]
    assert x0.dtype == torch.float32
    assert np.array_equal(x0.numpy(), latents.astype(np.float32))


def test_there_is_one_copy_of_an_array_and_it_lives_as_long(monkeypatch):
    monkeypatch.setattr(datasets, "fits_on", lambda device, n_bytes: True)
    images, labels = numbered()
    first, second = (Batches(images, labels, 8, CPU, Batching(shuffle=True)) for _ in range(2))
    assert first.images.data_ptr() == second.images.data_ptr()
    monkeypatch.undo()
    rows = Batches(images, labels, 8, CPU, Batching(shuffle=True))
    for a, b in zip(first[3], rows[3], strict=True):
        assert torch.equal(a, b)
    assert len(datasets._copies) == 1
    del images, rows
    gc.collect()
    assert not datasets._copies
