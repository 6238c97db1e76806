"""Names that people chose, such as those of classes, in figures: in a font that has their letters.

Matplotlib is imported where something is drawn.
"""

import functools
from collections.abc import Sequence

from utils import log


def as_written(names: Sequence[str]) -> dict:
    """How to show names that people chose, such as those of classes: a $ is a dollar, and what
    the usual font lacks comes from an installed font that has it."""
    from matplotlib.font_manager import FontProperties

    families, lacking = fonts_with(frozenset("".join(names)))
    if lacking:
        log.warning(
            "no font here has %s: boxes in the figure; install one that has, such as Noto Sans CJK",
            "".join(sorted(lacking)),
        )
    return {"parse_math": False, "fontfamily": [*FontProperties().get_family(), *families]}


@functools.cache
def fonts_with(characters: frozenset[str]) -> tuple[list[str], set[str]]:
    """Families of installed fonts that have what the usual one lacks, and what none has."""
    from matplotlib.font_manager import FontProperties, findfont, fontManager

    lacking = {c for c in characters if c.isprintable()} - _characters(findfont(FontProperties()))
    families = []
    for font in fontManager.ttflist:
        if not lacking:
            break
        try:
            found = lacking & _characters(font.fname)
        except (OSError, RuntimeError):  # the list is older than the folder; or a damaged font
            continue
        if found:
            families.append(font.name)
            lacking -= found
    return families, lacking


def _characters(font: str) -> set[str]:
    from matplotlib.font_manager import get_font

    return {chr(code) for code in get_font(font).get_charmap()}
