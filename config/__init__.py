"""Reads a YAML experiment into a checked `Config`, and says in one line what is wrong with it."""

import difflib
import math
import re
import reprlib
from pathlib import Path

import yaml
from pydantic import BaseModel, ValidationError

from config.schema import FOREIGN_NETWORKS, NEEDS, PROCESSES, Config
from support.errors import UserError

__all__ = ["Config", "config_differences", "idle_settings", "load_config", "parse_config"]


MISSING = object()
MOST_VALUES = 10_000  # of a file; the largest one here has some 60
_SHORT = reprlib.Repr()  # of what a config holds by mistake: it may be a megabyte
_SHORT.maxstring = _SHORT.maxother = 60


class _Loader(yaml.SafeLoader):
    """YAML with the numbers of NUMBERS alone, and in which a key stands once in its section."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"'{key.value}' stands here a second time", key.start_mark
                )
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


# By YAML 1.1, which PyYAML reads, 1e-4 is text, and 0123, 1_000, 12:30 and 2024-06-01 are not.
NUMBERS = {
    "int": r"[-+]?(0|[1-9]\d*)$",
    "float": r"[-+]?((\d+\.\d*|\.\d+)([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.inf|\.nan)$",
}
_OTHERS = {f"tag:yaml.org,2002:{kind}" for kind in (*NUMBERS, "timestamp")}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in rows if tag not in _OTHERS]
    for first, rows in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, _form in NUMBERS.items():
    _tag = f"tag:yaml.org,2002:{_kind}"
    _Loader.add_implicit_resolver(_tag, re.compile(_form), list("-+.0123456789"))


def _read_yaml(text: str, where: str) -> object:
    """Raises UserError, which begins with `where`, for what is not YAML, or too much of it."""
    try:
        values = yaml.load(text, _Loader)
        if _size(values, {}) > MOST_VALUES:
            raise yaml.YAMLError(f"its aliases make more than {MOST_VALUES:,} values of it")
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number of too many digits
        raise UserError(f"{where}: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deeply") from None
    return values


def _size(value: object, known: dict[int, float]) -> float:
    """How many values there are, counting what an alias repeats as often as it stands there."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = math.inf  # it may hold itself
        inner = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_size(one, known) for one in inner)
    return known[id(value)]


def load_config(path: str | Path, overrides: list[str] = (), may_be_idle: bool = False) -> Config:
    """Reads `path` (YAML) and applies `overrides`, each `key=value` with dots for sections.

    Raises UserError that names the file, the key and the nearest valid one; unless they
    `may_be_idle` also for values that change nothing, see `refuse_idle`.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        known = ", ".join(sorted(str(p) for p in Path("config").glob("**/*.yaml"))) or "none"
        raise UserError(f"{path}: no such config. Those in config/: {known}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    values = _read_yaml(text, f"{path}: not valid YAML")
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected 'key: value' lines, found a {type(values).__name__}")
    config = parse_config(values, overrides, source=str(path))
    if not may_be_idle:
        refuse_idle(config, str(path))
    return config


def refuse_idle(config: Config, source: str) -> None:
    """Raises UserError for a value of `idle_settings` that is not the default: a sweep over it
    would train the same network again and again.

    It is for what people write. Checkpoints are read whatever they hold.
    """
    lines = []
    for name in sorted(idle_settings(config)):
        value, default = _value(config, name)
        if value != default:
            other, wanted = NEEDS[name]
            lines.append(
                f"{source}: {name}: changes nothing unless {other} is "
                f"{' or '.join(map(str, wanted))} (found {_value(config, other)[0]}): set that, or "
                "leave it out"
            )
    if lines:
        raise UserError("\n".join(lines))


def idle_settings(config: Config) -> set[str]:
    """The settings that by another one change nothing, such as "distill.weight" without a loss."""
    decided = {name: (_value(config, other), wanted) for name, (other, wanted) in NEEDS.items()}
    return {
        name
        for name, ((value, default), wanted) in decided.items()
        if default is not MISSING and value not in wanted
    }


def _value(config: Config, name: str) -> tuple[object, object]:
    """(the value, its default) of a setting, such as distill.loss; MISSING where this process does
    not have it."""
    *sections, last = name.split(".")
    here = config
    for section in sections:
        here = getattr(here, section)
    field = type(here).model_fields.get(last)
    return (getattr(here, last), field.default) if field else (MISSING, MISSING)


def parse_config(values: dict, overrides: list[str] = (), source: str = "config") -> Config:
    """Checks a nested dict, such as the one inside a checkpoint.

    Raises UserError that names `source`, the key and the nearest valid one.
    """
    for override in overrides:
        values = _with_override(values, override)
    name = values.get("model_type", next(iter(PROCESSES)))
    if not isinstance(name, str) or name not in PROCESSES:
        raise UserError(f"{source}: model_type: no '{name}': there are {', '.join(PROCESSES)}")
    kind = FOREIGN_NETWORKS.get(str(values.get("net_type")), PROCESSES[name])
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = [f"{source}: {_explain(e, kind)}" for e in error.errors()]
        raise UserError("\n".join(lines)) from None


def config_differences(ours: Config, theirs: Config, ignore: set[str] = frozenset()) -> list[str]:
    """Lines `key: ours, theirs` for every value that differs; `ignore` names keys, those of a
    section as "network.dropout"."""
    lines = []
    for key, a in ours.model_dump().items():
        b = theirs.model_dump()[key]
        if key in ignore or a == b:
            continue
        if isinstance(a, dict):
            keys = sorted(set(a) | set(b))
            keys = [k for k in keys if f"{key}.{k}" not in ignore]
            pairs = [(f"{key}.{k}", a.get(k), b.get(k)) for k in keys if a.get(k) != b.get(k)]
        else:
            pairs = [(key, a, b)]
        lines += [f"{name}: {x}, not {y}" for name, x, y in pairs]
    return lines


def _with_override(values: dict, override: str) -> dict:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override}: expected key=value, as in --set linear.timestep=21")
    value = _read_yaml(text, f"--set {override}")
    *sections, last = key.split(".")
    values = dict(values)
    here = values
    for section in sections:
        inner = here.get(section) or {}
        if not isinstance(inner, dict):
            raise UserError(f"--set {override}: {section} is a value, not a section")
        here[section] = dict(inner)
        here = here[section]
    here[last] = value
    return values


def _explain(error: dict, kind: type[Config]) -> str:
    path = [part for part in error["loc"] if isinstance(part, str)]
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        known = _keys_of(kind, path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(known)}"
        return f"unknown key '{key}': {hint}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}: {message} (found {_SHORT.repr(error['input'])})"


def _keys_of(kind: type[Config], path: list[str]) -> list[str]:
    section: type[BaseModel] = kind
    for name in path:
        section = section.model_fields[name].annotation
    return list(section.model_fields)
