"""Kills, mutated files, full disks: what the jobs do when things go wrong, counted.

python -m benchmarks.faults                       # everything; about two hours on one core
python -m benchmarks.faults --parts kills --cases train,sample --runs 10
"""

import argparse
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from arguments import JobParser, at_least, names_of
from benchmarks.fault_kills import CASES, in_words, measure_kills
from benchmarks.fault_mutations import measure_checkpoints, measure_yaml
from benchmarks.fault_places import ATTEMPTS, measure_places
from benchmarks.record import record_of
from cli import job, one_process
from evaluation.tables import as_markdown, as_text, write_text
from support.files import check_writable, write_json
from utils import log

PARTS = ("kills", "places", "yaml", "checkpoints")
FAULTS_SHOWN = 5  # of each row, below the table; the JSON has all


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The arguments. `parts`, `cases` and `attempts` are lists."""
    parser = JobParser(__doc__.splitlines()[0], ())
    parser.add_argument(
        "--parts", type=names_of(PARTS), default=list(PARTS), metavar="NAME,NAME",
        help=f"which (default: all): {','.join(PARTS)}",
    )  # fmt: skip
    parser.add_argument(
        "--cases", type=names_of(CASES), default=list(CASES), metavar="NAME,NAME",
        help=f"of kills (default: all): {','.join(CASES)}",
    )  # fmt: skip
    parser.add_argument(
        "--attempts", type=names_of(ATTEMPTS), default=list(ATTEMPTS), metavar="NAME,NAME",
        help=f"of places (default: all): {','.join(ATTEMPTS)}",
    )  # fmt: skip
    parser.add_argument("--runs", type=int, default=100, help="of train.py that are killed")
    parser.add_argument("--job_runs", type=int, default=20, help="of every other job")
    parser.add_argument("--yaml", type=int, default=1000, help="mutated YAML files")
    parser.add_argument("--checkpoints", type=int, default=500, help="mutated checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="of moments and mutations")
    parser.add_argument("--output_dir", default="results", help="where faults.json and .md go")
    args = parser.parse_args(argv)
    at_least(args, runs=1, job_runs=1, yaml=1, checkpoints=1)
    one_process("benchmarks.faults")
    return args


@job
def main(argv: list[str] | None = None) -> int:
    """Tries all that was asked for, writes faults.json after each part, and prints a table.

    Exit code 1 if a fault was found.
    """
    args = parse_args(argv)
    check_writable([args.output_dir])
    stem = Path(args.output_dir) / "faults"
    record = record_of("benchmarks.faults", argv, torch.device("cpu"))
    record |= {"seed": args.seed, "parts": {}}
    with TemporaryDirectory() as folder:
        for name in args.parts:
            log.info("%s ...", name)
            record["parts"][name] = tried(name, Path(folder) / name, args)
            write_json(stem.with_suffix(".json"), record)
    title = f"What went wrong when things went wrong, on {record['machine']['name']}"
    tables = {"seed " + str(args.seed): table(record["parts"])}
    closing = faults_of(record["parts"])
    write_text(stem.with_suffix(".md"), as_markdown(title, tables, closing))
    print(as_text(title, tables, closing))
    print(f"\nwrote {stem}.json and {stem}.md")
    return 1 if closing else 0


def tried(part: str, folder: Path, args: argparse.Namespace) -> dict[str, dict]:
    """{row of the table: its counts and faults} of one part."""
    folder.mkdir()
    if part == "kills":
        runs = {name: args.runs if name == "train" else args.job_runs for name in args.cases}
        return measure_kills(folder, runs, args.seed)
    if part == "places":
        return measure_places(folder, args.attempts, args.seed)
    if part == "yaml":
        return {"mutated YAML files": measure_yaml(folder, args.yaml, args.seed)}
    return {"mutated checkpoints": measure_checkpoints(folder, args.checkpoints, args.seed)}


def rows_of(parts: dict[str, dict]) -> Iterable[tuple[str, dict]]:
    """(what was tried, what came of it), a row each."""
    for found in parts.values():
        yield from found.items()


def table(parts: dict[str, dict]) -> list[list[str]]:
    """A row for each thing that was tried."""
    rows = [["what", "tried", "and", "faults"]]
    for name, row in rows_of(parts):
        rows.append([name, str(row["tried"]), how(row), str(len(row["faults"]))])
    return rows


def how(row: dict) -> str:
    """What else there is to say of a row."""
    if "kills" in row:
        return in_words(row)
    if "exit_codes" in row:
        return ", ".join(f"exit code {code}: {n}" for code, n in row["exit_codes"].items())
    return row.get("why", "")


def faults_of(parts: dict[str, dict]) -> list[str]:
    """A line for each of the first faults of each row."""
    lines = []
    for name, row in rows_of(parts):
        lines += [f"{name}: {fault}" for fault in row["faults"][:FAULTS_SHOWN]]
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
