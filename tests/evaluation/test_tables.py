"""Numbers of tables against what they are computed from."""

import pytest

from evaluation.tables import markdown_table, wilson_interval


@pytest.mark.parametrize(
    ("correct", "n", "interval"),
    [
        # Newcombe 1998, table I, method 3
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ],
)
def test_interval_is_wilsons(correct, n, interval):
    assert wilson_interval(correct / n, n) == pytest.approx(interval, abs=5e-5)


def test_a_markdown_table_keeps_its_first_column_to_the_left():
    rows = [["block", "t=1"], ["out_1", "50.00"]]
    assert markdown_table(rows) == "| block | t=1 |\n|---|---:|\n| out_1 | 50.00 |"
