"""Mutated configs and checkpoints, given to the jobs that read them."""

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
import yaml

from benchmarks.fault_jobs import Ended, run_job
from benchmarks.fault_mutants import (
    CONFIGS,
    FILES,
    HOSTILE,
    STATES,
    VALUES,
    flip_in_weight,
    mutate_json,
)
from benchmarks.record import ROOT
from benchmarks.startup import CELL, TINY, save_untrained

LIMIT_S = 120  # a job takes seconds; after this it hangs
MEMORY = 4 << 30  # bytes that a job may take
SHIPPED = ROOT / "config"
IN_A_WEIGHT = "a bit flipped in a weight"  # which has to be noticed
FIT = ["--epochs", "1", "--n_train", "20", "--batch_size", "10"]
CONFIG_JOBS = {  # what reads a config, and is done in a second with TINY
    "train": ["--dry_run"],
    "linear": ["--protocol", "cached", "--n_train", "20", *CELL],
    "sample": ["--n", "1", "--steps", "1"],
    "contrastive": ["--n", "20", "--blocks", "out_2"],
    "visualize_features": ["--n", "20", *CELL],
    "finetune": [*FIT, "--warm_epochs", "0"],
    "noisy_classifier": ["--backbone", "ddae", *FIT, "--n_test", "20"],
}
READS_WEIGHTS = ("linear", "sample", "contrastive", "finetune")


def measure_yaml(folder: Path, n: int, seed: int) -> dict:
    """What jobs do with n mutated YAML files: the shipped ones, and one of a tiny network on
    digits, whose run is there."""
    found = Found(folder)
    texts = [_of_tiny(folder)] * 15  # about as many as are shipped
    texts += [_saving_in(folder, path.read_text()) for path in sorted(SHIPPED.rglob("*.yaml"))]
    for number in range(n):
        draw = random.Random(f"{seed} yaml {number}")
        kind, job = draw.choice(list(CONFIGS)), draw.choice(list(CONFIG_JOBS))
        text, name = draw.choice(texts), kind
        if draw.random() < 0.2:
            first = draw.choice(list(VALUES))
            text, name = VALUES[first](text, draw).decode(), f"{first}, then {kind}"
        text = CONFIGS[kind](text, draw)
        path = folder / "config.yaml"
        path.write_bytes(text)
        given = ["--config", str(path), "--data_dir", str(folder / "data"), "--device", "cpu"]
        found.add(name, number, job, [*given, *CONFIG_JOBS[job]], [path, folder / "kept"])
    return found.row()


def measure_checkpoints(folder: Path, n: int, seed: int) -> dict:
    """What jobs do with n mutated checkpoints: of training, as export.py writes them, and, where
    that is installed, of diffusers."""
    found = Found(folder)
    _of_tiny(folder)
    targets = _targets(folder)
    for number in range(n):
        draw = random.Random(f"{seed} checkpoint {number}")
        target = draw.choice(targets)
        kind = draw.choice(list(target.mutations))
        place = folder / "mutated"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(target.folder, place)
        target.mutations[kind](place / target.file, draw)
        job, words = target.command(place, draw)
        must = {2} if kind == IN_A_WEIGHT and target.has_checksum else {0, 2}
        found.add(f"{target.name}: {kind}", number, job, words, [place, folder / "kept"], must)
    return found.row()


# --- what is judged


class Found:
    """Counts and faults. Jobs run in `folder`, where `kept` holds a file that is none of theirs."""

    def __init__(self, folder: Path):
        self.folder, self.kinds, self.codes, self.faults = folder, Counter(), Counter(), []
        (folder / "kept").mkdir(parents=True)
        (folder / "kept" / "notes.txt").write_text("not ours")
        (folder / "data").mkdir()

    def add(
        self,
        kind: str,
        number: int,
        job: str,
        words: list[str],
        unchanged: list[Path],
        codes: set[int] = frozenset({0, 2}),
    ) -> None:
        """Runs a job that should end with one of `codes`, and if with 2, leave `unchanged` so."""
        before = [_contents(path) for path in unchanged]
        end = run_job(job, words, self.folder / "log.txt", LIMIT_S, self.folder, MEMORY)
        wrong = _wrong(end, codes)
        if end.code == 2 and [_contents(path) for path in unchanged] != before:
            wrong.append("a file was changed")
        if list(self.folder.rglob(HOSTILE)):
            wrong.append("code was run")
        self.kinds[kind] += 1
        self.codes[str(end.code)] += 1
        self.faults += [
            {"kind": kind, "number": number, "command": " ".join([f"{job}.py", *words]),
             "what": what, "said": end.said[-500:]}
            for what in wrong
        ]  # fmt: skip

    def row(self) -> dict:
        """Of the table: how many were tried, with which exit codes, and the faults."""
        return {
            "tried": self.kinds.total(), "kinds": dict(self.kinds), "exit_codes": dict(self.codes),
            "faults": self.faults,
        }  # fmt: skip


def _wrong(end: Ended, codes: set[int]) -> list[str]:
    if end.code is None:
        return ["hang"]
    wrong = [] if end.code in codes else [f"exit code {end.code}, not {sorted(codes)}"]
    return [*wrong, "traceback"] if end.traceback else wrong


def _contents(path: Path) -> dict[str, bytes]:
    """Of a file or of all files in a folder, without what a training logs."""
    paths = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    kept = (
        p for p in paths if "tensorboard" not in p.parts and p.suffix not in (".jsonl", ".lock")
    )
    return {str(p): p.read_bytes() for p in kept}


# --- what is mutated


@dataclass(frozen=True)
class Target:
    """A file in a folder, what may happen to it, and the job that reads the folder."""

    name: str
    folder: Path
    file: str
    mutations: dict[str, Callable[[Path, random.Random], None]]
    command: Callable[[Path, random.Random], tuple[str, list[str]]]
    has_checksum: bool = True


def _of_tiny(folder: Path) -> str:
    """The YAML of a tiny network, whose untrained weights are in `run`."""
    settings = TINY | {"save_dir": str(folder / "run")}
    if not (folder / "run").exists():
        save_untrained(settings)
    return yaml.safe_dump(settings)


def _saving_in(folder: Path, text: str) -> str:
    """A shipped config, which saves below `folder`."""
    lines = [line for line in text.splitlines() if not line.startswith("save_dir")]
    return "\n".join([*lines, f"save_dir: {folder / 'run'}"])


def _targets(folder: Path) -> list[Target]:
    """All that is there to be mutated, made from the run in `folder`."""
    trained, exported, loose = folder / "trained", folder / "exported", folder / "loose"
    made = [
        ("train", [*_train(trained), "--set", "sample_every=1"]),
        ("export", [*_train(trained), "--output_dir", str(exported)]),
    ]
    for job, words in made:
        end = run_job(job, words, folder / "log.txt", LIMIT_S, folder)
        if end.code != 0:
            raise RuntimeError(f"{job} ended with {end.code}: {end.said[-1500:]}")
    loose.mkdir()
    shutil.copy(exported / "model.safetensors", loose)
    in_weight = {IN_A_WEIGHT: flip_in_weight}
    pth = FILES | STATES | in_weight
    targets = [
        Target("latest.pth", trained, "ckpts/latest.pth", pth, lambda at, draw: (
            "train", [*_train(at), "--set", "n_epoch=2"])),
        Target("model_0.pth", trained, "ckpts/model_0.pth", pth, _reads("ckpts/model_0.pth")),
        Target("exported weights", exported, "model.safetensors", FILES | in_weight, _reads("")),
        Target("their config.json", exported, "config.json",
               FILES | {"a value changed": mutate_json}, _reads("")),
        Target("loose weights", loose, "model.safetensors", FILES | in_weight,
               _reads("model.safetensors"), has_checksum=False),
    ]  # fmt: skip
    return targets + (_diffusers(folder / "diffusers") if find_spec("diffusers") else [])


def _train(save_dir: Path) -> list[str]:
    """One step in `save_dir`, of a config beside it."""
    config = save_dir.parent / "tiny.yaml"
    config.write_text(json.dumps(TINY | {"n_step": 1, "n_sample": 1}))
    return ["--config", str(config), "--device", "cpu", "--set", f"save_dir={save_dir}"]


def _reads(file: str) -> Callable[[Path, random.Random], tuple[str, list[str]]]:
    """A job that is given --ckpt <folder>/<file>."""

    def command(folder: Path, draw: random.Random) -> tuple[str, list[str]]:
        job = draw.choice(READS_WEIGHTS)
        save = ["--set", f"save_dir={folder.parent / 'results'}"]
        return job, ["--ckpt", str(folder / file), "--device", "cpu", *save, *CONFIG_JOBS[job]]

    return command


def _diffusers(folder: Path) -> list[Target]:
    """What a folder of diffusers holds, of a tiny network on digits."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(32, 32),
        layers_per_block=1, down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder)
    names = ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json")
    of_json = FILES | {"a value changed": mutate_json}
    targets = [Target(f"diffusers, {name}", folder, name, of_json, _of_digits) for name in names]
    weights = "unet/diffusion_pytorch_model.safetensors"
    return [*targets, Target(f"diffusers, {weights}", folder, weights, FILES, _of_digits)]


def _of_digits(folder: Path, draw: random.Random) -> tuple[str, list[str]]:
    job, words = _reads("")(folder, draw)
    return job, [*words, "--set", "dataset=digits", "--set", "linear.blockname=out_2"]
