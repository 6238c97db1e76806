"""What every command line shares: given options, values at the wrong place, output nobody reads."""

import io
import os
import subprocess
import sys

import pytest
from conftest import ROOT

import fid
import finetune
import sample
import train
import visualize_diffusion
from arguments import Exclusion
from benchmarks import gpu
from cli import job_parser
from config import parse_config
from evaluation.classifiers.finetuning import RECIPE
from evaluation.samples.sample_sets import missing_images
from model.models import build_denoiser
from sampling import sampler_settings
from support.errors import UserError
from support.streams import Lasting
from utils import pick_device

# --- options that exclude each other


@pytest.mark.parametrize(("argv", "words"), [
    (["--ckpt", "x.pth", "--epoch", "-1"], "--ckpt and --epoch"),  # the default, but typed
    (["--config", "a.yaml", "--dataset", "digits"], "--config and --dataset"),
    (["--kind", "a", "--number", "3"], "--kind a and --number exclude each other: of b"),
])  # fmt: skip
def test_what_is_typed_counts(argv, words):
    with pytest.raises(UserError, match=words):
        parser().parse_args(argv)


@pytest.mark.parametrize("argv", [["--ckpt", "x.pth"], ["--kind", "b", "--number", "3"], []])
def test_what_is_not_typed_excludes_nothing(argv):
    args = parser().parse_args(argv)
    assert (args.epoch, args.number) == (-1, 3)


def parser():
    parser = job_parser("", excludes=[Exclusion("kind", ("number",), "of b", when="a")])
    parser.add_argument("--kind", choices=["a", "b"])
    parser.add_argument("--number", type=int, default=3, help="how many")
    return parser


def test_help_shows_defaults():
    assert "how many (default: 3)" in parser().format_help()


# --- values that pass or fail at the wrong place


@pytest.mark.parametrize(("parse", "argv", "words"), [
    (sample.parse_args, ["--epoch", "-2"], "--epoch: -2: give at least -1"),
    (sample.parse_args, ["--epoch", "new"], "--epoch: 'new': expected a whole number"),
    (sample.parse_args, ["--interpolate", "-1", "3"], "--interpolate -1: give at least 0"),
    (sample.parse_args, ["--steps", "many"], "invalid int value: 'many'"),
    (sample.parse_args, ["--no_such_option"], "unrecognized arguments: --no_such_option"),
    (train.parse_args, ["--epoch", "49"], "unrecognized arguments: --epoch"),
    (gpu.parse_args, ["--stages", "data,sped"], "no 'sped': there are tests,precision"),
    (fid.parse_args, ["--n", "1"], "FID needs at least 2 images"),
    (visualize_diffusion.parse_args, ["--device", "cpu"], "unrecognized arguments: --device"),
])  # fmt: skip
def test_an_argument_that_cannot_be_is_refused_in_words(parse, argv, words):
    with pytest.raises(UserError, match=words):
        parse(argv)


@pytest.mark.parametrize("name", ["cpu:3", "meta", "xpu", "gpu", "cuda:x"])
def test_a_device_that_cannot_compute_is_refused(name):
    with pytest.raises(UserError, match=f"--device {name}"):
        pick_device(name)


@pytest.mark.parametrize("lr", ["nan", "inf", "0", "-1"])
def test_a_rate_that_cannot_be_is_refused(lr):
    with pytest.raises(UserError, match="--lr"):
        RECIPE.changed_by(vars(finetune.parse_args(["--lr", lr])))


def test_the_default_sampler_takes_no_more_steps_than_there_are():
    few = build_denoiser(parse_config({"diffusion": {"n_T": 50}}))
    assert sampler_settings(few).steps == 50
    assert sampler_settings(build_denoiser(parse_config({}))).steps == 100


def test_missing_images_are_a_range_where_they_can_be(tmp_path):
    assert missing_images(tmp_path, 10**12) == range(10**12)
    (tmp_path / "pngs").mkdir()
    for i in (0, 1, 3):
        (tmp_path / "pngs" / f"{i}.png").touch()
    assert list(missing_images(tmp_path, 6)) == [2, 4, 5]
    (tmp_path / "pngs" / "2.png").touch()
    assert missing_images(tmp_path, 10**12) == range(4, 10**12)
    assert list(missing_images(tmp_path, 2)) == []


# --- output that nobody reads


def test_a_pipe_without_reader_takes_all():
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as pipe:
        stream = Lasting(pipe)
        for _ in range(2):
            assert stream.write("word " * 10_000) == 50_000
            stream.flush()


def test_a_full_disk_is_still_an_error():
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    with pytest.raises(OSError, match="No space"), open("/dev/full", "w") as full:
        Lasting(full).write("word " * 10_000)


def test_a_character_that_the_terminal_lacks_is_replaced():
    buffer = io.BytesIO()
    stream = Lasting(io.TextIOWrapper(buffer, encoding="ascii"))
    stream.write("90 ± 1 m²")
    stream.flush()
    assert buffer.getvalue() == b"90 ? 1 m?"


CLOSED = {
    "pipe": "| head -c 1 > {folder}/head",
    "stdout": ">&-",
    "stderr": "2>&-",
    "ascii": "> {folder}/words",
}


@pytest.mark.parametrize("how", CLOSED)
def test_a_job_ends_with_its_files_whoever_reads(how, tiny_yaml, tiny_checkpoint, tmp_path):
    command = (
        f"{sys.executable} contrastive.py --config {tiny_yaml} --device cpu --n 20 "
        f"{CLOSED[how].format(folder=tmp_path)}; exit ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert {"contrastive.json", "contrastive.png"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }
