"""Every job finds out where it cannot write before it begins to work."""

import importlib
import os
import tempfile
from pathlib import Path

import pytest
from conftest import JOBS, READS_A_MODEL

import cli
from support.errors import UserError
from support.files import check_writable

NEEDS = {
    "fid": ["--n", "4"],
    "visualize_features": ["--timestep", "1", "--blockname", "out_1"],
    "noisy_classifier": ["--backbone", "ddae"],
    "export": [],
}
OPTIONS = [
    ("linear", "--save_features", "."),
    ("linear", "--output_dir", "{file}/below"),
    ("visualize_diffusion", "--save_path", "."),
    ("fid", "--export_reference", "{file}"),
    ("fid", "--export_reference", "."),
    ("fid", "--output_dir", "{file}"),
    ("sample", "--output_dir", "{file}"),
    ("export", "--output_dir", "{file}/below"),
    ("train", "--output_dir", "{file}"),
    ("finetune", "--output_dir", "{loose}"),
    ("contrastive", "--output_dir", "a\0b"),
    ("visualize_features", "--output_dir", "n" * 300),
]
BENCHMARKS = [
    ("gpu", ["--output_dir"]), ("training", ["--output_dir"]), ("recipes", ["--runs"]),
    ("scale", ["--output_dir"]), ("samplers", ["--output_dir"]),
    ("guidance", ["samples", "--output_dir"]),
]  # fmt: skip


@pytest.fixture
def works(monkeypatch) -> list[str]:
    """The splits that a job has read: reading them is the first long work."""
    found = []
    real = cli.read_dataset

    def read(config, data_dir, split, skip):
        found.append(split)
        return real(config, data_dir, split, skip)

    monkeypatch.setattr(cli, "read_dataset", read)
    return found


@pytest.fixture
def a_file(tmp_path) -> Path:
    path = tmp_path / "a_file"
    path.write_text("not ours")
    return path


@pytest.mark.parametrize("place", ["{file}", "{file}/below/it", "{loose}"])
@pytest.mark.parametrize("job", [*JOBS, "export"])
def test_a_save_dir_that_cannot_be(
    job, place, tiny_yaml, tiny_checkpoint, tmp_path, a_file, works, mistake
):
    (tmp_path / "loose").symlink_to(tmp_path / "nothing")
    save_dir = place.format(file=a_file, loose=tmp_path / "loose")
    argv = ["--config", str(tiny_yaml), "--set", f"save_dir={save_dir}", *NEEDS.get(job, [])]
    if job in (*READS_A_MODEL, "export"):
        argv += ["--ckpt", str(tiny_checkpoint)]
    with mistake(f"error: {save_dir}"):
        importlib.import_module(job).main(argv)
    assert not works
    assert a_file.read_text() == "not ours"


@pytest.mark.parametrize(("job", "option", "place"), OPTIONS)
def test_an_option_that_names_such_a_place(
    job, option, place, tiny_yaml, tiny_checkpoint, tmp_path, a_file, works, mistake, monkeypatch
):
    (tmp_path / "loose").symlink_to(tmp_path / "nothing")
    monkeypatch.chdir(tmp_path)
    place = place.format(file=a_file, loose=tmp_path / "loose")
    argv = ["--config", str(tiny_yaml), option, place, *NEEDS.get(job, [])]
    with mistake(f"error: {place}"):
        importlib.import_module(job).main(argv)
    assert not works


@pytest.mark.parametrize(("name", "options"), BENCHMARKS)
def test_benchmarks_ask_too(
    name, options, tiny_yaml, tiny_checkpoint, a_file, works, mistake, monkeypatch
):
    with mistake(f"error: {a_file}"):
        importlib.import_module(f"benchmarks.{name}").main(
            ["--config", str(tiny_yaml), *options, str(a_file)]
        )
    assert not works


def test_a_place_that_will_do_is_left_as_it_is(tmp_path):
    check_writable([tmp_path / "a" / "b", tmp_path], [tmp_path / "c" / "d.json", None])
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="needs users")
def test_a_folder_without_permission():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)  # whom permissions bind
        try:
            with pytest.raises(UserError, match=r"runs/x: nothing .* \(Permission denied\)"):
                check_writable([Path(folder, "runs", "x")])
        finally:
            if root:
                os.seteuid(0)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no /proc")
def test_a_folder_where_the_system_makes_no_files():
    with pytest.raises(UserError, match="/proc/self/runs: nothing can be written"):
        check_writable(["/proc/self/runs"])
