"""Numbers and tables as text and Markdown."""


def wilson_interval(accuracy: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a proportion in 0..1 that was measured on n images (Wilson 1927)."""
    from scipy.stats import binomtest  # slow to import

    interval = binomtest(round(accuracy * n), n).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def percent(part: float) -> str:
    """A part in 0..1 in %, without the sign: 58.49."""
    return f"{100 * part:.2f}"


def with_interval(part: float, interval: tuple[float, float], unit: str = "") -> str:
    """A part and its interval, all in 0..1, in %: 58.49 (57.5-59.5)."""
    low, high = interval
    return f"{percent(part)}{unit} ({100 * low:.1f}-{100 * high:.1f})"


def ends(interval: tuple[float, float]) -> tuple[float, float]:
    """An interval in 0..1, in %: the ends of an error bar."""
    low, high = interval
    return 100 * low, 100 * high


def aligned(rows: list[list[str]]) -> str:
    """Rows of equal length as a table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def as_text(title: str, tables: dict[str, list[list[str]]], closing: list[str]) -> str:
    """The title, each table below what it is, and the closing lines."""
    parts = [f"{heading}\n{aligned(rows)}" for heading, rows in tables.items()]
    return "\n\n".join([title, *parts, "\n".join(closing)]).rstrip()


def markdown_table(rows: list[list[str]]) -> str:
    """Rows of equal length, the first one being the header; numbers stand to the right."""
    header, *body = ["| " + " | ".join(row) + " |" for row in rows]
    rule = "|---|" + "---:|" * (len(rows[0]) - 1)
    return "\n".join([header, rule, *body])


def as_markdown(title: str, tables: dict[str, list[list[str]]], closing: list[str]) -> str:
    """The same in Markdown."""
    parts = [f"**{title}**"]
    for heading, rows in tables.items():
        parts += [heading, markdown_table(rows)]
    return "\n\n".join([*parts, "\n".join(f"- {line}" for line in closing)]).rstrip() + "\n"


def find_or_add_row(rows: list[dict], settings: dict, blank: dict) -> dict:
    """The first row that holds these settings; if there is none, a new one, with `blank` added."""
    for row in rows:
        if settings.items() <= row.items():
            return row
    rows.append(settings | blank)
    return rows[-1]
