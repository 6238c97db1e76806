"""Command lines in general: a parser that complains as jobs do, and types of arguments."""

import argparse
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NoReturn

from support.errors import UserError


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default only where it says something."""

    def _get_help_string(self, action: argparse.Action) -> str:
        silent = action.default in (None, False, []) or "default" in action.help
        return action.help if silent else super()._get_help_string(action)


@dataclass(frozen=True)
class Exclusion:
    """An option that forbids others beside it, and why."""

    option: str
    others: tuple[str, ...]
    why: str
    when: str | None = None  # the one value of `option` that forbids them; None: any


class JobParser(argparse.ArgumentParser):
    """An argument parser whose every complaint is a UserError."""

    def __init__(self, description: str, excludes: Collection[Exclusion]):
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False)
        self.excludes = excludes

    def parse_args(
        self, args: list[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """The arguments. Raises UserError for options that are given and exclude each other.

        An option is given if it was typed, also with the value of its default.
        """
        namespace = super().parse_args(args, namespace)
        nothing = argparse.Namespace(**dict.fromkeys(vars(namespace)))
        typed = vars(super().parse_args(args, nothing))  # again, with None for every default
        given = {name: value for name, value in typed.items() if value is not None}
        for row in self.excludes:
            if row.option not in given or row.when not in (None, given[row.option]):
                continue
            for other in row.others:
                if other in given:
                    option = " ".join(filter(None, (row.option, row.when)))
                    raise UserError(f"--{option} and --{other} exclude each other: {row.why}")
        return namespace

    def error(self, message: str) -> NoReturn:
        """Raises UserError, which `job` prints, where argparse would print and exit."""
        raise UserError(f"{message}; --help shows all arguments")


def at_least(args: argparse.Namespace, **least: int) -> None:
    """Raises UserError for an option, a number or a list of them, that is below its limit."""
    for name, limit in least.items():
        value = getattr(args, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and number < limit:
                raise UserError(f"--{name} {number}: give at least {limit}")


def int_from(least: int) -> Callable[[str], int]:
    """The argument type of a whole number that is at least `least`."""

    def whole_number(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}': expected a whole number") from None
        if number < least:
            raise argparse.ArgumentTypeError(f"{number}: give at least {least}")
        return number

    return whole_number


def int_list(text: str) -> list[int]:
    """The argument type of 1,2,3."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}': expected whole numbers, as in 1,2,3") from None


def sums_of(kind: type) -> Callable[[str], list[list]]:
    """The argument type of 1,11,1+11: [[1], [11], [1, 11]]."""

    def sums(text: str) -> list[list]:
        try:
            return [[kind(part) for part in some.split("+")] for some in text.split(",")]
        except ValueError:
            what = "whole numbers" if kind is int else "numbers"
            raise argparse.ArgumentTypeError(f"'{text}': expected {what}, as in 1,2,1+2") from None

    return sums


def names_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """The argument type of a,b: some of `known`."""

    def names(text: str) -> list[str]:
        asked = text.split(",")
        if unknown := sorted(set(asked) - set(known)):
            raise argparse.ArgumentTypeError(f"no '{unknown[0]}': there are {','.join(known)}")
        return asked

    return names
