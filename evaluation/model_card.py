"""The model card of released weights: README.md as the Hugging Face Hub shows it."""

import shutil
from pathlib import Path

from checkpoint import TrainedModel, versions
from evaluation.probe.cells import CellResult
from evaluation.probe.grid_files import (
    COMPARABLE,
    FACTS,
    file_stem,
    gain_rows,
    grids_in,
    probed_alike,
    untrained_results,
    weights_of,
)
from evaluation.tables import markdown_table, percent
from support.files import load_json, replacing, write_text

HUB_DATASETS = {  # their names on the Hub, and where their own terms stand
    "cifar10": ("uoft-cs/cifar10", "https://www.cs.toronto.edu/~kriz/cifar.html"),
    "cifar100": ("uoft-cs/cifar100", "https://www.cs.toronto.edu/~kriz/cifar.html"),
    "mnist": ("ylecun/mnist", "http://yann.lecun.com/exdb/mnist/"),
    "fashion_mnist": (
        "zalando-datasets/fashion_mnist", "https://github.com/zalandoresearch/fashion-mnist",
    ),
    "tiny_imagenet": ("zh-plus/tiny-imagenet", "https://www.image-net.org/download.php"),
}  # fmt: skip
PIXELS = FACTS | {"headline": {"test_accuracy": int | float}}  # read of their grid
NOT_MEASURED = "not measured"
SAMPLING = ("sampler", "steps", "eta", "spacing", "sigma_max", "guidance")  # options of sample.py
RECIPE = ("batch_size", "accumulate", "optim", "lrate", "warm_epoch", "warm_step", "lr_decay",
          "ema", "grad_clip", "flip", "cond_drop_prob", "seed")  # fmt: skip


def write_card(
    folder: Path, model: TrainedModel, released: dict, results: Path
) -> tuple[list[Path], list[str]]:
    """Writes <folder>/README.md and, where there is one, samples.png, of what lies in `results`.

    released: what config.json holds. Returns the paths and the probes that were found.
    """
    known = {released["fingerprint"], released["rounded_fingerprint"]}
    rows, best = probe_rows(results, known)
    paths = [folder / "README.md"]
    asked = model.config.linear
    cell = best.cell.parts[0] if best else (asked.timestep, asked.blockname)
    picture, sampling = samples_of(results, known)
    if picture is None:
        (folder / "samples.png").unlink(missing_ok=True)  # an earlier export's, of other weights
    else:
        paths.append(folder / "samples.png")
        with replacing(paths[1]) as temporary:
            shutil.copyfile(picture, temporary)
    parts = [
        _front_matter(released), _what(model, released), _use(folder, sampling, *cell),
        _recipe(released), _probes(rows), _limits(released),
        _licence(released["config"]["dataset"]), _files(released),
    ]  # fmt: skip
    if picture is not None:
        parts.insert(5, "## Samples\n\n![samples of the EMA weights](samples.png)")
    write_text(paths[0], "\n\n".join(parts) + "\n")
    return paths, [row[0] for row in rows]


def probe_rows(results: Path, fingerprints: set[str]) -> tuple[list[list[str]], CellResult | None]:
    """A row for each grid in `results` of a model with one of these fingerprints, of the most
    training images that there are: protocol, cell, accuracy, and beside it the same cell of an
    untrained network and the pixels. And the best cell of the first."""
    rows, first = [], None
    records = grids_in(results, COMPARABLE).values()
    grids = [record for record in records if weights_of(record) in fingerprints]
    most = max((record["n_train"] for record in grids), default=0)
    for record in [record for record in grids if record["n_train"] == most]:
        protocol = record["protocol"]
        best = CellResult.from_record(record["headline"])
        untrained = untrained_results(results, record, [best])
        of_untrained = gain_rows([best], untrained)[1][2:] if untrained else [NOT_MEASURED] * 2
        pixels = load_json(results / f"{file_stem(None, protocol, 'pixels')}.json", PIXELS)
        alike = pixels and probed_alike(pixels, record)
        of_pixels = percent(pixels["headline"]["test_accuracy"]) if alike else NOT_MEASURED
        rows.append([protocol, best.name, best.on_test, *of_untrained, of_pixels])
        first = first or best
    return rows, first


def samples_of(results: Path, fingerprints: set[str]) -> tuple[Path | None, dict]:
    """The newest grid of samples in `results`, or a folder in it, of one of these weights, and its
    record; (None, {}) without."""
    grids = []
    for path in [*results.glob("samples.json"), *results.glob("*/samples.json")]:
        record = load_json(path)
        if record is not None and record.get("weights") in fingerprints:
            names = (path.with_name("grid.png"), path.with_name("samples_grid.png"))
            grids += [(name, record) for name in names if name.is_file()]
    return max(grids, key=lambda grid: grid[0].stat().st_mtime, default=(None, {}))


def _front_matter(released: dict) -> str:
    name = released["config"]["dataset"]
    lines = ["---", "license: mit", "library_name: pytorch"]
    lines += ["pipeline_tag: unconditional-image-generation"]
    if name in HUB_DATASETS:
        lines += ["datasets:", f"- {HUB_DATASETS[name][0]}"]
    tags = ["diffusion", released["config"]["model_type"].lower(), "self-supervised-learning"]
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in [*tags, "linear-probe"]), "---"])


def _what(model: TrainedModel, released: dict) -> str:
    config = model.config
    parameters = sum(p.numel() for p in model.denoiser.parameters())
    labels = "with labels" if config.cond_drop_prob else "without labels"
    dataset = released["config"]["dataset"]
    return (
        f"# tiny-ddae: {config.model_type} on {dataset}, {model.stage}\n\n"
        f"A denoising diffusion network of {parameters:,} parameters, trained {labels} on "
        f"{dataset} ({'x'.join(map(str, config.network.image_shape))}). A linear classifier "
        "reads the classes from the features of its decoder blocks, as in [Denoising Diffusion "
        "Autoencoders are Unified Self-supervised Learners](https://arxiv.org/abs/2303.09769). "
        f"These are the EMA weights as {released['dtype']}; they are loaded as float32."
    )


def _use(folder: Path, sampling: dict, t: float, block: str) -> str:
    name = folder.name if folder.is_absolute() else folder.as_posix()
    given = {key: sampling[key] for key in SAMPLING if sampling.get(key) is not None}
    if sampling.get("classes"):
        given["classes"] = ",".join(map(str, sampling["classes"]))
    sampler = "".join(f" --{key} {value}" for key, value in given.items())
    sampler += " --no_clip" if sampling.get("clip") is False else ""
    return f"""## Use

In a clone of tiny-ddae:

```bash
python sample.py --ckpt {name} --n 16{sampler}
python linear.py --ckpt {name} --grid --protocol cached
```

```python
from checkpoint import load_denoiser

D = load_denoiser("{name}").denoiser
features = D.features(x0, {t}, noise, ["{block}"])  # x0: (N, C, H, W), clean images in [-1, 1]
denoised = D(x0 + sigma * noise, sigma)  # sigma: (N,); in the sum as (N, 1, 1, 1)
```"""


def _recipe(released: dict) -> str:
    config = released["config"]
    trained, made = released.get("versions", {}), versions()
    of_all = "" if config["n_step"] else f" of {config['n_epoch']}"  # which n_step overrules
    rows = [["setting", "value"], ["epochs", f"{released['epoch'] + 1}{of_all}"]]
    if "step" in released:
        images = released["step"] * config["batch_size"] * config["accumulate"]
        rows += [["optimizer steps", f"{released['step']:,}"], ["images seen", f"{images:,}"]]
    if start := config["start_from"]:
        rows += [["began with the weights of", f"{start}, whose images come on top"]]
    rows += [[key, str(config[key])] for key in RECIPE]
    if (distill := config["distill"])["loss"]:
        rows += [[f"distill.{key}", str(value)] for key, value in distill.items()]
    rows += [["commit of the training", trained.get("tiny-ddae", "not recorded")]]
    rows += [["commit of this export", made.get("tiny-ddae", "not known")]]
    rows += [["libraries", ", ".join(f"{k} {v}" for k, v in trained.items() if k != "tiny-ddae")]]
    return f"## Recipe\n\n{markdown_table(rows)}\n\n`config.json` holds the whole configuration."


def _probes(rows: list[list[str]]) -> str:
    if not rows:
        return "## Linear probe\n\nNot measured: no grid of these weights was there at the export."
    header = ["protocol", "cell", "test accuracy in % (95 % interval)",
              "untrained network, same cell", "gain", "raw pixels"]  # fmt: skip
    return (
        f"## Linear probe\n\n{markdown_table([header, *rows])}\n\nThe cell is picked on images "
        "held out of train, and its accuracy is that on test. Measured by `linear.py --grid` with "
        "the protocol that stands in the row; figures of different protocols do not compare."
    )


def _limits(released: dict) -> str:
    lines = [
        f"It knows {released['config']['dataset']} and nothing else; features of other images "
        "were not measured.",
        f"It is one run with one seed ({released['config']['seed']}).",
        "Whether samples repeat training images was not tested here.",
        "It is an object of study, not for decisions about people.",
    ]
    config = released["config"]
    if n_step := config["n_step"]:  # which overrules n_epoch
        missing, unit = n_step - released.get("step", n_step), "optimizer steps"
    else:
        missing, unit = config["n_epoch"] - released["epoch"] - 1, "epochs"
    if missing > 0:
        lines.insert(1, f"It was saved {missing:,} {unit} before the end of its recipe.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _licence(dataset: str) -> str:
    terms = f" ({HUB_DATASETS[dataset][1]})" if dataset in HUB_DATASETS else ""
    return f"## Licence\n\nCode and weights: MIT. The dataset is under its own terms{terms}."


def _files(released: dict) -> str:
    return (
        f"## Files\n\n`model.safetensors`: {released['bytes']:,} bytes, SHA-256 "
        f"`{released['sha256']}`, which `config.json` holds too and every load checks."
    )
