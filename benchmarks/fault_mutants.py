"""Mutations of configs and checkpoints: each a function and a row.

Those of a config take (text, draw) and return bytes, those of a file (path, draw) and change it.
"""

import io
import json
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
import yaml

from checkpoint import CHECKSUM

HOSTILE = "code_was_run"  # the file that hostile input would make in the working folder
WRONG = [
    "yes",
    "",
    None,
    [],
    {},
    [1, 2],
    {"a": 1},
    True,
    "1e-3x",
    "☃",
    -1,
    0.5,
    [[]],
    "nan",
    "../..",
]
EXTREME = [float("nan"), float("inf"), -float("inf"), -1, 0, 1e308, 1e-320, 10**30, 2**63, -(2**31)]
DEEP = 3000  # levels


# --- configs: values


def _leaves(values: object, above: tuple = ()) -> list[tuple]:
    """The paths of all values that are not dicts."""
    if not isinstance(values, dict):
        return [above]
    return [path for name, value in values.items() for path in _leaves(value, (*above, name))]


def _at(values: dict, path: tuple) -> dict:
    for name in path[:-1]:
        values = values[name]
    return values


def _changed(change: Callable[[dict, str, random.Random], None]) -> Callable:
    """The mutation that parses, changes one value, and writes it again."""

    def mutate(text: str, draw: random.Random) -> bytes:
        values = yaml.safe_load(text)
        path = draw.choice(_leaves(values))
        change(_at(values, path), path[-1], draw)
        return yaml.safe_dump(values, allow_unicode=True, sort_keys=False).encode()

    return mutate


def _misspell(place: dict, name: str, draw: random.Random) -> None:
    value, text = place.pop(name), str(name) or "name"
    i = draw.randrange(len(text))
    place[text[:i] + draw.choice(["", "_", "é", text[i].upper()]) + text[i + 1 :]] = value


def _wrong_type(place: dict, name: str, draw: random.Random) -> None:
    place[name] = draw.choice(WRONG)


def _extreme(place: dict, name: str, draw: random.Random) -> None:
    old, new = place[name], draw.choice(EXTREME)
    place[name] = [new] * len(old) if isinstance(old, list) else new


def _long(place: dict, name: str, draw: random.Random) -> None:
    place[name] = draw.choice(["x" * 100_000, list(range(10_000)), "🦆" * 300])


def _remove(place: dict, name: str, draw: random.Random) -> None:
    del place[name]


def _add(place: dict, name: str, draw: random.Random) -> None:
    place[draw.choice(["extra", "lr", "", "__class__", 3, True])] = draw.choice(WRONG)


# --- configs: text


def _lines(change: Callable[[list[str], int, random.Random], None]) -> Callable:
    """The mutation that changes the lines, at one of them."""

    def mutate(text: str, draw: random.Random) -> bytes:
        lines = text.splitlines()
        change(lines, draw.randrange(len(lines)), draw)
        return "\n".join(lines).encode()

    return mutate


def _value_in_text(new: Callable[[random.Random], str]) -> Callable:
    """The mutation that writes something else behind a colon."""

    def change(lines: list[str], i: int, draw: random.Random) -> None:
        lines[i] = lines[i].partition(":")[0] + ": " + new(draw)

    return _lines(change)


def _swap(lines: list[str], i: int, draw: random.Random) -> None:
    j = draw.randrange(len(lines))
    lines[i], lines[j] = lines[j], lines[i]


def _hostile_tag(draw: random.Random) -> str:
    call = f'["touch {HOSTILE}"]'
    return draw.choice([
        f"!!python/object/apply:os.system {call}", f"!!python/object/new:os.system {call}",
        "!!python/name:os.system", "!!python/module:os", "!!binary aGk=", "!unknown 3",
    ])  # fmt: skip


def _bomb(text: str, draw: random.Random) -> bytes:
    levels = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
    return "\n".join(["a0: &a0 [x, x]", *levels, text, "classes: *a8"]).encode()


def _flip_bytes(text: str, draw: random.Random) -> bytes:
    data = bytearray(text.encode())
    for _ in range(draw.randint(1, 5)):
        data[draw.randrange(len(data))] = draw.randrange(256)
    return bytes(data)


def _put(piece: bytes) -> Callable:
    """The mutation that puts bytes at a random place."""

    def mutate(text: str, draw: random.Random) -> bytes:
        data = text.encode()
        i = draw.randrange(len(data))
        return data[:i] + piece + data[i:]

    return mutate


VALUES: dict[str, Callable[[str, random.Random], bytes]] = {
    "a misspelt key": _changed(_misspell),
    "another type": _changed(_wrong_type),
    "an extreme number": _changed(_extreme),
    "a long value": _changed(_long),
    "a missing key": _changed(_remove),
    "an extra key": _changed(_add),
}
CONFIGS: dict[str, Callable[[str, random.Random], bytes]] = {
    **VALUES,
    "a line left out": _lines(lambda lines, i, draw: lines.pop(i)),
    "a line twice": _lines(lambda lines, i, draw: lines.insert(i, lines[i])),
    "lines in another order": _lines(_swap),
    "other indentation": _lines(
        lambda lines, i, draw: lines.__setitem__(i, draw.choice(["\t", " ", "   "]) + lines[i])
    ),
    "a hostile tag": _value_in_text(_hostile_tag),
    "deep nesting": _value_in_text(lambda draw: "[" * DEEP + "]" * DEEP),
    "an alias of nothing": _value_in_text(lambda draw: "*nothing"),
    "unclosed": _value_in_text(lambda draw: draw.choice(["[1, 2", "{a: 1", "\"a", "&", "|"])),
    "aliases that multiply": _bomb,
    "cut": lambda text, draw: text[: draw.randrange(len(text))].encode(),
    "other bytes": _flip_bytes,
    "a null byte": _put(b"\0"),
    "invalid UTF-8": _put(b"\xff\xfe"),
    "control characters": _put(b"\x1b[31m\x07"),
    "a byte order mark": lambda text, draw: b"\xef\xbb\xbf" + text.encode(),
    "UTF-16": lambda text, draw: text.encode("utf-16"),
    "empty": lambda text, draw: draw.choice([b"", b"\n", b"---\n", b"null", b"[]", b"3", b"a"]),
    "two documents": lambda text, draw: f"{text}\n---\n{text}".encode(),
    "random bytes": lambda text, draw: draw.randbytes(200),
}  # fmt: skip


# --- files


def _rewritten(change: Callable[[bytearray, random.Random], object]) -> Callable:
    """The mutation that changes the bytes of a file, in place or into what is returned."""

    def mutate(path: Path, draw: random.Random) -> None:
        data = bytearray(path.read_bytes())
        path.write_bytes(change(data, draw) or data)

    return mutate


def _flip(data: bytearray, draw: random.Random) -> None:
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def _zeros(data: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(data))
    end = min(start + 4096, len(data))
    data[start:end] = bytes(end - start)


class _Hostile:
    def __reduce__(self) -> tuple:
        return (exec, (f"open({HOSTILE!r}, 'w').close()",))


def _hostile_pickle(path: Path, draw: random.Random) -> None:
    """A pickle that runs code, alone or inside what torch.save wrote."""
    if draw.random() < 0.5:
        path.write_bytes(pickle.dumps({"net": _Hostile()}))
        return
    made = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(made, "w") as new:
        for name in old.namelist():
            hostile = name.endswith("data.pkl")
            new.writestr(name, pickle.dumps(_Hostile(), 2) if hostile else old.read(name))
    path.write_bytes(made.getvalue())


FILES: dict[str, Callable[[Path, random.Random], None]] = {
    "cut": _rewritten(lambda data, draw: bytes(data[: draw.randrange(1, len(data))])),
    "empty": lambda path, draw: path.write_bytes(b""),
    "a bit flipped": _rewritten(_flip),
    "zeros": _rewritten(_zeros),
    "bytes at the end": _rewritten(lambda data, draw: bytes(data) + draw.randbytes(50)),
    "random bytes": lambda path, draw: path.write_bytes(draw.randbytes(5000)),
    "another kind of file": lambda path, draw: path.write_bytes(
        draw.choice([b"\x89PNG\r\n\x1a\n", b"{}", b"hello\n", b"PK\x03\x04", b"\x80\x04N."])
    ),
    "missing": lambda path, draw: path.unlink(),
    "a folder": lambda path, draw: (path.unlink(), path.mkdir()),
}


# --- checkpoints of training


def _resaved(change: Callable[[dict, random.Random], None]) -> Callable:
    """The mutation that changes what a .pth holds and saves it as an older version did, without a
    checksum."""

    def mutate(path: Path, draw: random.Random) -> None:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state.pop(CHECKSUM, None)
        change(state, draw)
        torch.save(state, path)

    return mutate


def _weight(change: Callable[[torch.Tensor], object]) -> Callable:
    """The mutation that replaces one weight."""

    def mutate(state: dict, draw: random.Random) -> None:
        weights = state[draw.choice(["net", "ema"])]
        name = draw.choice(sorted(weights))
        weights[name] = change(weights[name])

    return _resaved(mutate)


def _rename(state: dict, draw: random.Random) -> None:
    part = draw.choice([state, state["net"], state["ema"], state["config"]])
    name = draw.choice(sorted(part))
    part[name + "_"] = part.pop(name)


def _drop(state: dict, draw: random.Random) -> None:
    part = draw.choice([state, state["net"], state["ema"], state["config"]])
    del part[draw.choice(sorted(part))]


def _retype(state: dict, draw: random.Random) -> None:
    part = draw.choice([state, state["config"], state.get("resume", state)])
    part[draw.choice(sorted(part))] = draw.choice(WRONG)


STATES: dict[str, Callable[[Path, random.Random], None]] = {
    "a key renamed": _resaved(_rename),
    "a key left out": _resaved(_drop),
    "a part of another type": _resaved(_retype),
    "a weight of another shape": _weight(lambda weight: weight.new_zeros(3, 1, 2)),
    "a weight of another dtype": _weight(lambda weight: (weight * 50).to(torch.int8)),
    "complex numbers": _weight(lambda weight: weight.to(torch.complex64)),
    "a weight that is NaN": _weight(lambda weight: weight * float("nan")),
    "a string for a weight": _weight(lambda weight: "weight"),
    "a list for a weight": _weight(lambda weight: weight.tolist()),
    "a hostile pickle": _hostile_pickle,
}


def flip_in_weight(path: Path, draw: random.Random) -> None:
    """Flips a bit of the largest weight that a .pth or a .safetensors holds."""
    data = bytearray(path.read_bytes())
    if path.suffix == ".safetensors":
        (header,) = struct.unpack("<Q", data[:8])
        first, last = 8 + header, len(data) - 1
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
        weight = max(state["ema"].values(), key=torch.Tensor.numel).numpy().tobytes()
        first = data.index(weight)
        last = first + len(weight) - 1
    data[draw.randint(first, last)] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def mutate_json(path: Path, draw: random.Random) -> None:
    """Changes, renames or removes a value of a JSON file."""
    values = json.loads(path.read_text())
    place = _at(values, path_in := draw.choice(_leaves(values)))
    change = draw.choice([_misspell, _wrong_type, _extreme, _remove, _add])
    change(place, path_in[-1], draw)
    path.write_text(json.dumps({str(name): value for name, value in values.items()}))
