"""Jobs that are killed at random moments and started again, beside the same job left alone."""

import json
import random
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.fault_compare import differences, half_written
from benchmarks.fault_jobs import Ended, Job, run_job

MOST_KILLS = 3  # of a run
SLOW = 20  # times as long as left alone, and a job hangs
LEAST_S = 60  # and at least so long
LIMIT_S = 600  # of a job left alone
CONFIG = {  # seconds of training, on images that need no download
    "dataset": "digits", "flip": True, "batch_size": 64, "n_step": 44, "n_epoch": 2,
    "warm_epoch": 1, "lrate": 1e-3, "ema": 0.99, "n_sample": 2, "sample_every": 1, "save_every": 1,
    "network": {
        "image_shape": [1, 8, 8], "n_channels": 32, "ch_mults": [1, 2], "is_attn": [False, False],
        "dropout": 0.1,
    },
    "linear": {"n_epoch": 2, "timestep": 21, "blockname": "out_2"},
}  # fmt: skip
GRID = ["--grid", "--blocks", "out_1,out_2,out_3", "--timesteps", "11,21", "--n_train", "300"]
WRN = ["--backbone", "wrn", "--depth", "10", "--width", "1", "--epochs", "3", "--warm_epochs", "1"]


@dataclass(frozen=True)
class Case:
    """A job and its arguments, beside the config; `from_scratch` without a trained network."""

    job: str
    words: tuple[str, ...] = ()
    from_scratch: bool = False


CASES = {
    "train": Case("train", from_scratch=True),
    "linear paper": Case("linear", (*GRID, "--protocol", "paper")),
    "linear cached": Case("linear", (*GRID, "--protocol", "cached")),
    "sample": Case("sample", ("--n", "12", "--batch_size", "4", "--steps", "20")),
    "finetune": Case("finetune", ("--epochs", "3", "--n_train", "300")),
    "noisy_classifier": Case("noisy_classifier", (*WRN, "--n_train", "300", "--n_test", "100")),
    "reproduce": Case("reproduce", ("--n", "4"), from_scratch=True),
}


def measure_kills(folder: Path, runs: dict[str, int], seed: int) -> Iterator[tuple[str, dict]]:
    """(what was killed, what came of it, see `Work.measure`) of so many `runs` of each case.

    Every run of a case has the same path, so that records that name it are equal.
    """
    trained = None
    for name, number in runs.items():
        case = CASES[name]
        if not case.from_scratch and trained is None:
            trained = _trained(folder / "training")
        work = Work(case, folder / name.replace(" ", "_"), trained)
        yield f"{name}, killed", work.measure(number, seed)


def in_words(row: dict) -> str:
    """What was done to a case."""
    return (
        f"{row['kills']} kills, {row['kills_while_writing']} while a file was being written; "
        f"{row['identical']} of {row['tried']} ended as without"
    )


def _trained(folder: Path) -> Path:
    """The folder of a finished training."""
    work = Work(CASES["train"], folder, None)
    work.alone()
    return work.run


class Work:
    """The runs of one case in one folder: `run`, and `expected` of the one that nobody kills.

    trained: the folder of a finished training, which each begins with unless its case begins from
    scratch. settings: beside CONFIG.
    """

    def __init__(
        self, case: Case, folder: Path, trained: Path | None, settings: dict | None = None
    ):
        self.case, self.trained = case, None if case.from_scratch else trained
        self.seconds = 0.0  # that the job takes, left alone
        self.run, self.expected, self.log = folder / "run", folder / "expected", folder / "log.txt"
        folder.mkdir(parents=True)
        config = folder / "config.yaml"  # JSON is YAML
        config.write_text(json.dumps(CONFIG | (settings or {}) | {"save_dir": str(self.run)}))
        self.words = ["--config", str(config), "--device", "cpu", *case.words]

    def alone(self) -> float:
        """The job to its end in an empty folder, or one with a trained network. Returns seconds.

        Raises RuntimeError if it fails.
        """
        self.begin()
        started = time.monotonic()
        end = run_job(self.case.job, self.words, self.log, LIMIT_S)
        if end.code != 0:
            raise RuntimeError(f"{self.case.job} ended with {end.code}: {end.said[-1500:]}")
        return time.monotonic() - started

    def begin(self) -> None:
        """The folder of the run as it is before the job."""
        shutil.rmtree(self.run, ignore_errors=True)
        if self.trained is not None:
            shutil.copytree(self.trained, self.run)

    def measure(self, runs: int, seed: int) -> dict:
        """Counts and faults of so many runs, each killed and started again until it ends."""
        self.alone()  # the first reads files from the disk
        self.seconds = self.alone()
        shutil.copytree(self.run, self.expected)
        row = {"tried": runs, "identical": 0, "kills": 0, "kills_while_writing": 0, "faults": []}
        for number in range(runs):
            draw = random.Random(f"{seed} {self.case.job} {self.case.words} {number}")
            kills, writing, faults = self.killed_and_resumed(draw)
            row["kills"] += kills
            row["kills_while_writing"] += writing
            row["identical"] += not faults
            row["faults"] += [{"run": number, "what": fault} for fault in faults]
        return row | {"seconds_left_alone": round(self.seconds, 2)}

    def killed_and_resumed(self, draw: random.Random) -> tuple[int, int, list[str]]:
        """(kills, those of them while a file was being written, what was wrong).

        A job that ends before its first kill begins anew, and is known to be so fast.
        """
        kills, writing, wanted = 0, 0, draw.randint(1, MOST_KILLS)
        self.begin()
        while kills < wanted:
            started = time.monotonic()
            end = self.killed(draw.uniform(0, self.seconds), while_writing=draw.random() < 0.5)
            if end.code == -signal.SIGKILL:
                kills += 1
                writing += bool(half_written(self.run))
            elif end.code != 0:
                return kills, writing, [_in_words(end)]
            elif kills:
                return kills, writing, self.faults()
            else:
                self.seconds = min(self.seconds, time.monotonic() - started)
                self.begin()
        end = run_job(self.case.job, self.words, self.log, SLOW * self.seconds + LEAST_S)
        return kills, writing, self.faults() if end.code == 0 else [_in_words(end)]

    def killed(self, after_s: float, while_writing: bool) -> Ended:
        """The job, killed after so long; then, if wanted, as soon as it writes a file."""
        job = Job(self.case.job, self.words, self.log)
        job.process.join(after_s)
        while while_writing and job.process.is_alive() and not half_written(self.run):
            time.sleep(0.0002)
        return job.kill()

    def faults(self) -> list[str]:
        """What is not as in the run that nobody killed."""
        return differences(self.expected, self.run)


def _in_words(end: Ended) -> str:
    code = "hung" if end.code is None else f"ended with {end.code}"
    return f"{code}: {end.said[-500:]}"
