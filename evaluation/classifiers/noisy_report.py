"""The accuracies of noisy classifiers as text, JSON and a plot, both backbones side by side."""

from pathlib import Path

from evaluation.classifiers.noisy import RECIPES
from evaluation.classifiers.supervised import comparable
from evaluation.plots import curves, subject
from evaluation.tables import aligned, ends, with_interval
from support import distributed
from support.files import write_json

NUMBER = int | float
RECORD = {  # the form of a backbone's .json, as far as it is read
    "name": str,
    "levels": [{"t": NUMBER, "sigma": NUMBER, "accuracy": NUMBER, "interval": [NUMBER]}],
}
SAME = (
    "dataset", "mode", "diffusion", "seed", "flip", "n_train", "train_fingerprint", "n_test",
    "test_fingerprint",
)  # fmt: skip


def write_accuracies(folder: Path, record: dict) -> None:
    """Writes noisy_<mode>_<backbone>.json and noisy_<mode>.png, and prints a table.

    The other backbones are in table and plot if their files are there, and are about the same test
    images and noise. Raises UserError if such a file is damaged.
    """
    mode, backbone = record["mode"], record["backbone"]
    paths = {name: folder / f"noisy_{mode}_{name}.json" for name in RECIPES}
    plot = folder / f"noisy_{mode}.png"
    if distributed.is_main():
        write_json(paths[backbone], record)
    records = [
        record if name == backbone else comparable(path, record, SAME, RECORD)
        for name, path in paths.items()
    ]
    records = [found for found in records if found]
    title = f"{record['n_test']:,} noisy {record['dataset']} test images, noise levels of {mode}"
    if distributed.is_main():
        what = subject(record["dataset"], mode)
        _plot(plot, records, f"{what}, {record['n_test']:,} noisy test images")
    print(f"{title}: accuracy in %, in brackets the 95 % interval\n")
    print(f"{_table(records)}\n\nwrote {paths[backbone]} and {plot}")


def _table(records: list[dict]) -> str:
    header = ["sigma", "t", *(record["name"] for record in records)]
    rows = [header]
    for levels in zip(*(record["levels"] for record in records), strict=True):
        cells = [with_interval(level["accuracy"], level["interval"]) for level in levels]
        rows.append([f"{levels[0]['sigma']:.4g}", str(levels[0]["t"]), *cells])
    return aligned(rows)


def _plot(path: Path, records: list[dict], title: str) -> None:
    sigmas = [level["sigma"] for level in records[0]["levels"]]
    lines, bars = {}, {}
    for record in records:
        name = record["name"]
        lines[name] = [100 * level["accuracy"] for level in record["levels"]]
        bars[name] = [ends(level["interval"]) for level in record["levels"]]
    curves(path, sigmas, lines, title, "sigma", "accuracy in % (bars: 95 %)", bars, log_x=True)
