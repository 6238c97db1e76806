"""Time and memory against width, image size and number of images, beside FLOPs and bytes.

python -m benchmarks.scaling --config config/DDPM_ddpm.yaml
python -m benchmarks.scaling --parts data --max_images 1000000
python -m benchmarks.scaling --parts start --files 100000
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from arguments import at_least, int_list, names_of
from benchmarks.memory import megabytes
from benchmarks.record import add_output_dir, record_of, write_record
from benchmarks.scaling_parts import data_row, network_row, start_row
from cli import config_path, job, job_parser, one_process, pick_config
from config import Config, parse_config
from evaluation.tables import aligned
from support.files import check_writable
from utils import pick_device

PARTS = ("width", "side", "data", "start")
SIZES = (1_000, 10_000, 100_000, 1_000_000)  # images of a memory map
COLUMNS = {  # of a network's row: what is shown, and what it ought to grow as
    "step_s": "train step s", "train_gflops": "its GFLOP", "train_peak": "its peak MB",
    "train_bytes": "tensors MB", "features_s": "features s", "features_gflops": "their GFLOP",
    "features_peak": "their peak MB",
}  # fmt: skip


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The arguments. `parts`, `widths` and `sides` are lists."""
    parser = job_parser(__doc__.splitlines()[0], checkpoint=False)
    parser.set_defaults(config="config/DDPM_ddpm.yaml")
    parser.add_argument(
        "--parts", type=names_of(PARTS), default=list(PARTS), metavar="NAME,NAME",
        help=f"which (default: all): {','.join(PARTS)}",
    )  # fmt: skip
    parser.add_argument(
        "--widths", type=int_list, default=[32, 64, 128], metavar="C,C",
        help="network.n_channels (default: 32,64,128)",
    )  # fmt: skip
    parser.add_argument(
        "--sides", type=int_list, default=[16, 32, 64], metavar="H,H",
        help="height and width of the images (default: 16,32,64)",
    )  # fmt: skip
    parser.add_argument("--batch_size", type=int, default=8, help="images of a step")
    parser.add_argument(
        "--max_images", type=int, default=100_000,
        help="of the largest memory map; a million of 32 x 32 take 3 GB of the temporary folder",
    )  # fmt: skip
    parser.add_argument(
        "--files", type=int, default=10_000, help="of the dataset whose start is timed"
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of what is timed")
    add_output_dir(parser, "scaling")
    args = parser.parse_args(argv)
    at_least(args, widths=1, sides=1, batch_size=1, max_images=1, files=20, rounds=1)
    one_process("benchmarks.scaling")
    return args


@job
def main(argv: list[str] | None = None) -> int:
    """Measures, writes scaling_<device>.json after each part, and prints a table of each."""
    args = parse_args(argv)
    check_writable([args.output_dir])
    config, device = pick_config(args), pick_device(args.device)
    config = config.model_copy(update={"batch_size": args.batch_size})
    measured: dict[str, Callable[[], Iterator[dict]]] = {
        "width": lambda: of_networks(config, "n_channels", args.widths, device, args),
        "side": lambda: of_networks(config, "image_shape", args.sides, device, args),
        "data": lambda: of_data(config, device, args),
        "start": lambda: of_start(args),
    }
    record = record_of("benchmarks.scaling", argv, device) | {
        "config": str(config_path(args)), "batch_size": args.batch_size, "rounds": args.rounds,
        "use_amp": args.use_amp, "parts": {},
    }  # fmt: skip
    print(f"{record['config']} on {record['machine']['name']}", flush=True)
    for part in args.parts:
        rows = record["parts"][part] = list(measured[part]())
        path = write_record(args.output_dir, "scaling", record, (args.parts, PARTS))
        print(f"\n{TABLES[part](part, rows)}", flush=True)
    print(f"\nwrote {path}")
    return 0


def of_networks(
    config: Config, key: str, values: list[int], device: torch.device, args: argparse.Namespace
) -> Iterator[dict]:
    """A row for each value of network.n_channels, or of the side of image_shape."""
    network_row(config, device, args.use_amp, rounds=1)  # what libraries allocate once
    for value in sorted(set(values)):
        channels = config.network.image_shape[0]
        setting = value if key == "n_channels" else f"[{channels}, {value}, {value}]"
        changed = parse_config(config.model_dump(mode="json"), [f"network.{key}={setting}"])
        yield {"value": value} | network_row(changed, device, args.use_amp, args.rounds)


def of_data(config: Config, device: torch.device, args: argparse.Namespace) -> Iterator[dict]:
    """A row for each size of a memory map, up to --max_images."""
    sizes = [n for n in SIZES if n < args.max_images] + [args.max_images]
    for n in sizes:
        with TemporaryDirectory() as folder:
            yield data_row(n, config, device, Path(folder))


def of_start(args: argparse.Namespace) -> Iterator[dict]:
    """The one row of the start of a job."""
    with TemporaryDirectory() as folder:
        yield start_row(args.files, Path(folder), args.rounds)


# --- tables


def network_table(part: str, rows: list[dict]) -> str:
    """Of each figure how it grew from the first row on, in brackets."""
    table = [[part, *COLUMNS.values()]]
    for row in rows:
        cells = []
        for name in COLUMNS:
            value, first = row[name], rows[0][name]
            text = megabytes(value) if name.endswith(("peak", "bytes")) else f"{value:,.3g}"
            cells.append(text if value is None or not first else f"{text} (x{value / first:.1f})")
        table.append([str(row["value"]), *cells])
    return aligned(table)


def data_table(part: str, rows: list[dict]) -> str:
    """Of a memory map."""
    table = [[
        "images", "MB on disk", "open s", "order of an epoch s", "fingerprint s", "images/s read",
        "peak MB of that",
    ]]  # fmt: skip
    for row in rows:
        table.append([
            f"{row['images']:,}", f"{row['bytes'] / 1e6:,.0f}", f"{row['open_s']:.3f}",
            f"{row['order_s']:.3f}", f"{row['fingerprint_s']:.2f}",
            f"{row['images_per_s']:,.0f}", megabytes(row["peak"]),
        ])  # fmt: skip
    return aligned(table)


def start_table(part: str, rows: list[dict]) -> str:
    """Of a job's start."""
    (row,) = rows
    whole, torch_alone = median(row["start_s"]), median(row["import_torch_s"])
    return (
        f"a job on a cached dataset of {row['files']:,} files begins after {whole:.2f} s: "
        f"{row['seconds_beyond']:.2f} s after `import torch` ({torch_alone:.2f} s) would have "
        f"ended; decoding them for the cache took {row['decode_s']:.1f} s"
    )


TABLES = {"width": network_table, "side": network_table, "data": data_table, "start": start_table}


if __name__ == "__main__":
    raise SystemExit(main())
