"""Disks that fill, folders that vanish, data that changes, a second run, and SIGTERM."""

import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.fault_jobs import JOBS, Ended, Job, run_job
from benchmarks.fault_kills import CASES, CONFIG, Case, Work
from benchmarks.record import ROOT
from benchmarks.startup import CELL
from evaluation.fid.inception import untrained_inception

TIMES = 5  # so often, at other moments and sizes
LIMIT_S = 300
TERMINATED = {0, 128 + signal.SIGTERM, -signal.SIGTERM}  # -15: it came before the job began
OTHERS = {  # jobs that no kill is tried on
    "visualize_features": Case("visualize_features", ("--n", "100", *CELL)),
    "contrastive": Case("contrastive", ("--n", "100", "--blocks", "out_1,out_2")),
    "visualize_diffusion": Case("visualize_diffusion", ("--num_images", "2"), from_scratch=True),
    "export": Case("export"),
    "fid": Case("fid", ("--n", "4", "--batch_size", "4")),
}
NOT_TAKEN = {"visualize_diffusion": ("--device", "cpu")}
ON_FOLDERS = {  # of few images, as `_class_folders` makes them
    "dataset": "folder", "classes": 2, "sample_every": 1000, "save_every": 20,
    "network": CONFIG["network"] | {"image_shape": [3, 8, 8]},
}  # fmt: skip
ON_A_SMALL_DISK = """
mount -t tmpfs -o size={size}k none {run} && {train}; echo "code $?"
mount -o remount,size=1g {run} && {train}; echo "code $?"
mount -o remount,ro {run} && {train}; echo "code $?"
"""
CODE = re.compile(r"^code (\d+)$", re.MULTILINE)


def measure_places(folder: Path, names: Sequence[str], seed: int) -> Iterator[tuple[str, dict]]:
    """(what was tried, {"tried": how often, "faults": what was wrong}) of these ATTEMPTS; where
    one cannot be tried here, {"tried": 0, "why": ...}."""
    for name in names:
        attempt = ATTEMPTS[name]
        what = attempt.__doc__.partition("\n")[0]
        yield what, attempt(folder / name, random.Random(f"{seed} {name}"))


def checked(end: Ended, codes: set[int], words: str = "") -> list[str]:
    """What is wrong with an end that should have one of these codes and have said `words`."""
    if end.code in codes and not end.traceback and re.search(words, end.said):
        return []
    return [f"ended with {end.code}, not {sorted(codes)}, {words!r}: {end.said[-500:]}"]


# --- disks and folders


def small_disk(folder: Path, draw: random.Random) -> dict:
    """train.py on a disk of a random size, then of a gigabyte, then read-only"""
    if why := _no_mounts():
        return {"tried": 0, "why": why, "faults": []}
    faults, first = [], Counter()
    for i in range(TIMES):
        work = Work(CASES["train"], folder / str(i), None)
        work.run.mkdir()
        train = shlex.join([sys.executable, "train.py", *work.words])
        script = ON_A_SMALL_DISK.format(size=draw.randint(40, 4000), run=work.run, train=train)
        done = subprocess.run(
            ["unshare", "-rm", "sh", "-c", script], cwd=ROOT, text=True, timeout=4 * LIMIT_S,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        codes = [int(code) for code in CODE.findall(done.stdout)]
        first[str(codes[0] if codes else None)] += 1
        fits = codes in ([0, 0, 2], [2, 0, 2])
        if not fits or Ended(0, done.stdout).traceback:
            faults.append(f"exit codes {codes}: {done.stdout[-1500:]}")
    return {"tried": TIMES, "exit_codes": dict(first), "faults": faults}


def _no_mounts() -> str | None:
    """Why no file system can be mounted here; None where one can."""
    if shutil.which("unshare") is None:
        return "no unshare here"
    test = "mount -t tmpfs none /tmp"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", test], capture_output=True, text=True)
    return f"mount: {done.stderr.strip()}" if done.returncode else None


def vanishing(folder: Path, draw: random.Random) -> dict:
    """train.py whose folder is removed at a random moment"""
    faults = []
    for i in range(TIMES):
        work = Work(CASES["train"], folder / str(i), None)
        job = Job("train", work.words, work.log)
        _wait_for(work.run / "metrics.jsonl", job)
        time.sleep(draw.uniform(0, 3))
        shutil.rmtree(work.run, ignore_errors=True)
        faults += checked(job.wait(LIMIT_S), {0, 2})
        faults += checked(run_job("train", work.words, work.log, LIMIT_S), {0})
    return {"tried": TIMES, "faults": faults}


# --- data


def changing(folder: Path, draw: random.Random) -> dict:
    """train.py on class folders in which a file changes, comes, goes or is cut; then it goes on"""
    faults, changes = [], (_repaint, _add, _remove, _damage)
    for i, change in enumerate(changes):
        data = folder / str(i) / "data"
        work = Work(CASES["train"], folder / str(i) / "work", None, ON_FOLDERS)
        _class_folders(data)
        words = [*work.words, "--data_dir", str(data)]
        job = Job("train", words, work.log)
        _wait_for(work.run / "metrics.jsonl", job)
        change(sorted(data.glob("train/*/*.png")), draw)
        faults += checked(job.wait(LIMIT_S), {0})
        longer = [*words, "--set", "n_step=70", "--set", "n_epoch=20"]
        end = run_job("train", longer, work.log, LIMIT_S)
        faults += checked(end, {2}, "cannot be read|--allow_changed_data")
    return {"tried": len(changes), "faults": faults}


def _class_folders(data: Path, images: int = 160) -> None:
    """Two classes of random images, to train and to test on."""
    pixels = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("a", "b"):
            folder = data / split / name
            folder.mkdir(parents=True)
            for i in range(images):
                array = pixels.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(array).save(folder / f"{i}.png")


def _repaint(paths: list[Path], draw: random.Random) -> None:
    Image.new("RGB", (8, 8), (draw.randrange(256), 0, 0)).save(draw.choice(paths))


def _add(paths: list[Path], draw: random.Random) -> None:
    shutil.copy(draw.choice(paths), paths[0].with_name("another.png"))


def _remove(paths: list[Path], draw: random.Random) -> None:
    draw.choice(paths).unlink()


def _damage(paths: list[Path], draw: random.Random) -> None:
    path = draw.choice(paths)
    path.write_bytes(path.read_bytes()[:40])


# --- two runs, and signals


def two_at_once(folder: Path, draw: random.Random) -> dict:
    """a second train.py in the same folder

    It is refused, also after the first was killed and has come again, which does not notice.
    """
    work = Work(CASES["train"], folder, None)
    work.alone()
    shutil.copytree(work.run, work.expected)
    work.begin()
    first = Job("train", work.words, work.log)
    _wait_for(work.run / "metrics.jsonl", first)
    faults, second = [], folder / "second.txt"
    for _ in range(TIMES):
        faults += checked(run_job("train", work.words, second, LIMIT_S), {2}, "another process")
        first.kill()
        first = Job("train", work.words, work.log)
        _wait_for(work.run / ".lock", first)
        time.sleep(draw.uniform(0, 0.5))
    faults += checked(first.wait(LIMIT_S), {0}) + work.faults()
    return {"tried": TIMES, "faults": faults}


def terminated(folder: Path, draw: random.Random) -> dict:
    """SIGTERM at a random moment, in every job; then the same command again"""
    data, weights = folder / "data", folder / "inception.pth"
    _class_folders(data)
    torch.save(untrained_inception().state_dict(), weights)
    training = Work(CASES["train"], folder / "training", None, ON_FOLDERS)
    training.words += ["--data_dir", str(data)]
    training.alone()
    faults = []
    for name in JOBS:
        case = OTHERS.get(name) or next(case for case in CASES.values() if case.job == name)
        work = Work(case, folder / name, training.run, ON_FOLDERS)
        words = [word for word in work.words if word not in NOT_TAKEN.get(name, ())]
        words += ["--data_dir", str(data)]
        words += ["--inception", str(weights)] if name in ("fid", "reproduce") else []
        work.begin()
        job = Job(name, words, work.log)
        job.process.join(draw.uniform(0.2, 3))
        job.send(signal.SIGTERM)
        faults += [f"{name}: {fault}" for fault in checked(job.wait(LIMIT_S), TERMINATED)]
        end = run_job(name, words, work.log, LIMIT_S)
        faults += [f"{name}, again: {fault}" for fault in checked(end, {0})]
    return {"tried": len(JOBS), "faults": faults}


def _wait_for(path: Path, job: Job) -> None:
    """Until the file is there or the job has ended."""
    while not path.exists() and job.process.is_alive():
        time.sleep(0.01)


ATTEMPTS: dict[str, Callable[[Path, random.Random], dict]] = {
    "small_disk": small_disk, "vanishing": vanishing, "changing": changing,
    "two_at_once": two_at_once, "sigterm": terminated,
}  # fmt: skip
