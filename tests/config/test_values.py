"""Values that must not pass: each key of the config gets all that YAML can hold."""

import contextlib
import copy
import math

import pytest

from config import load_config, parse_config
from config.schema import PROCESSES
from model.models import build_denoiser
from support.errors import UserError

ODD = [
    [1], {"a": 1}, None, True, math.nan, "", -1, 0, 10**30, "x", [[]], [True], b"x", 1.5, {1: 2},
    [None], ["DDPM"],
]  # fmt: skip


def paths(kind):
    for key, field in kind.model_fields.items():
        yield [key]
        yield from ([key, inner] for inner in getattr(field.annotation, "model_fields", {}))


@pytest.mark.parametrize("process", PROCESSES)
def test_an_odd_value_is_refused_in_words(process):
    for path in paths(PROCESSES[process]):
        for value in ODD:
            *sections, last = path
            values = {"model_type": process}
            inside = values
            for section in sections:
                inside = inside.setdefault(section, {})
            inside[last] = value
            try:
                config = parse_config(values)
            except UserError:
                continue
            assert parse_config(config.model_dump(mode="json")) == config  # as from a checkpoint


NETWORK = {"n_channels": 32, "ch_mults": [1, 2], "is_attn": [False, False]}
LABELLED = {"network": NETWORK, "cond_drop_prob": 0.1}  # of classes it makes a layer, too


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("number", [10**30, 2**63, 2**31])
def test_a_number_that_no_memory_holds_is_refused(process, number):
    """PyTorch and NumPy say it with a TypeError, an IndexError, or worse."""
    config = parse_config({"model_type": process, **LABELLED}).model_dump(mode="json")
    sized = [
        ("classes",),
        *((part, key) for part in ("network", "diffusion") for key in config[part]),
    ]
    for *sections, last in sized:
        values = copy.deepcopy(config)
        inside = values[sections[0]] if sections else values
        old = inside[last]
        inside[last] = [number] * len(old) if isinstance(old, list) else number
        with contextlib.suppress(UserError):
            build_denoiser(parse_config(values))
    with pytest.raises(UserError, match=r"network\.n_channels.*less than or equal to 65536"):
        parse_config({}, [f"network.n_channels={number}"])


@pytest.mark.parametrize("key", ["n_epoch", "lrate", "network.n_channels", "network.ch_mults"])
def test_yes_is_no_number(key):
    value = "[yes]" if key.endswith("mults") else "yes"
    with pytest.raises(UserError, match=rf"{key}.*YAML reads yes and no so"):
        parse_config({}, [f"{key}={value}"])


def test_a_switch_takes_yes():
    assert parse_config({}, ["flip=yes"]).flip


@pytest.mark.parametrize("text", ["1e-2", "1E-2", "1.e-2", "+1e-2", ".1e-1", "0.01"])
def test_numbers_with_an_exponent_are_numbers_everywhere(text, tmp_path):
    assert parse_config({}, [f"optim_args.weight_decay={text}"]).optim_args["weight_decay"] == 0.01
    path = tmp_path / "a.yaml"
    path.write_text(f"optim_args: {{weight_decay: {text}}}")
    assert load_config(path).optim_args == {"weight_decay": 0.01}


@pytest.mark.parametrize("value", ["nan", ".inf", "-.inf"])
def test_only_finite_numbers(value):
    with pytest.raises(UserError, match="lrate"):
        parse_config({}, [f"lrate={value}"])


@pytest.mark.parametrize(
    "text", ["n_epoch: 3\nlrate: 1e-4\nn_epoch: 4", "linear: {n_epoch: 1, n_epoch: 2}"]
)
def test_a_key_stands_once(text, tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"twice\.yaml.*'n_epoch' stands here a second time.*line"):
        load_config(path)


def test_what_a_yaml_library_cannot_make_is_refused_in_words():
    with pytest.raises(UserError, match="--set n_epoch=999"):
        parse_config({}, ["n_epoch=" + 5000 * "9"])


@pytest.mark.parametrize("name", ["2024", "0123", "2024_06_01", "2024-06-01", "12:30", "1_000"])
def test_a_folder_is_called_what_was_typed(name):
    assert parse_config({}, [f"save_dir={name}"]).save_dir == name


def test_a_number_that_is_written_otherwise_again_is_no_name():
    with pytest.raises(
        UserError, match=r"save_dir: expected a name, found .* 1000\.0: put it in q"
    ):
        parse_config({}, ["save_dir=1e3"])
    assert parse_config({}, ["save_dir='1e3'"]).save_dir == "1e3"


@pytest.mark.parametrize(("text", "value"), [
    ("1e-4", 1e-4), (".5", 0.5), ("+1.5E+2", 150.0), ("7", 7.0), (".inf", float("inf")),
])  # fmt: skip
def test_numbers(text, value):
    assert parse_config({}, [f"grad_clip={text}"]).grad_clip == value
