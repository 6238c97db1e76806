"""Kills, mutated files, full disks: what the jobs do when things go wrong, counted.

python -m benchmarks.faults                       # everything
python -m benchmarks.faults --parts kills --cases train,sample --runs 10
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from arguments import JobParser, at_least, names_of
from benchmarks.fault_kills import CASES, in_words, measure_kills
from benchmarks.fault_mutations import measure_checkpoints, measure_yaml
from benchmarks.fault_places import ATTEMPTS, measure_places
from benchmarks.record import record_of
from cli import job, one_process
from evaluation.tables import as_markdown, as_text
from support.files import check_writable, read_json, write_json, write_text
from utils import log

PARTS = ("kills", "places", "yaml", "checkpoints")
ROW = {"tried": int, "faults": list}
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
    """Tries all that was asked for, writes faults.json after each row, and prints a table.

    Rows of an earlier call that are not tried again stay. Exit code 1 if a row has faults.
    """
    args = parse_args(argv)
    check_writable([args.output_dir])
    stem = Path(args.output_dir) / "faults"
    path = stem.with_suffix(".json")
    rows = read_json(path, {"rows": {str: ROW}})["rows"] if path.exists() else {}
    of_each = record_of("benchmarks.faults", argv, torch.device("cpu")) | {"seed": args.seed}
    with TemporaryDirectory() as folder:
        for name, row in tried(Path(folder), args):
            log.info("%s: tried %d times, %d faults", name, row["tried"], len(row["faults"]))
            rows[name] = row | of_each
            write_json(path, {"rows": rows})
    title = "What the jobs do when things go wrong"
    heading = {"more in faults.json: command, commit, machine, seed": table(rows)}
    write_text(stem.with_suffix(".md"), as_markdown(title, heading, faults_of(rows)))
    print(as_text(title, heading, faults_of(rows)))
    print(f"\nwrote {path} and {stem}.md")
    return 1 if faults_of(rows) else 0


def tried(folder: Path, args: argparse.Namespace) -> Iterator[tuple[str, dict]]:
    """(what was tried, its counts and faults), a row of the table each."""
    for part in args.parts:
        place = folder / part
        place.mkdir()
        if part == "kills":
            runs = {name: args.runs if name == "train" else args.job_runs for name in args.cases}
            yield from measure_kills(place, runs, args.seed)
        elif part == "places":
            yield from measure_places(place, args.attempts, args.seed)
        elif part == "yaml":
            yield "mutated YAML files", measure_yaml(place, args.yaml, args.seed)
        else:
            yield "mutated checkpoints", measure_checkpoints(place, args.checkpoints, args.seed)


def table(rows: dict[str, dict]) -> list[list[str]]:
    """A row for each thing that was tried."""
    found = [["what", "tried", "in detail", "faults"]]
    for name, row in rows.items():
        found.append([name, str(row["tried"]), how(row), str(len(row["faults"]))])
    return found


def how(row: dict) -> str:
    """What else there is to say of a row."""
    if "kills" in row:
        return in_words(row)
    if "exit_codes" in row:
        return ", ".join(f"exit code {code}: {n}" for code, n in row["exit_codes"].items())
    return row.get("why", "")


def faults_of(rows: dict[str, dict]) -> list[str]:
    """A line for each of the first faults of each row."""
    return [
        f"{name}: {fault}" for name, row in rows.items() for fault in row["faults"][:FAULTS_SHOWN]
    ]


if __name__ == "__main__":
    raise SystemExit(main())
