"""Figures and tables on terminals of any width."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from latent_thoughts.terminal import Grid, bound_name, count, figure, named, output, percent, since


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.2494, "0.249"), (0.34, "0.340"), (2.0, "2.00"), (-0.137, "−0.137"), (64.0, "64.0"), (999.4, "999"),
        (999.7, "1,000"), (14122.3, "14,122"), (-1800.2, "−1,800"), (3, "3"), (12300, "12,300"), (3e-7, "3.00e−07"),
    ],
)  # fmt: skip
def test_figures(value: float, shown: str) -> None:
    assert figure(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"), (950, "950"), (9994, "9994"), (9996, "10.0 k"), (12_345, "12.3 k"), (638_000, "638 k"),
        (999_600, "1.00 M"), (999.7e6, "1.00 B"), (1.2e9, "1.20 B"), (1.6e12, "1.60 T"),
    ],
)  # fmt: skip
def test_counts_are_rounded_before_their_unit_is_chosen(value: float, shown: str) -> None:
    assert count(value) == shown


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (-3, "0 s"), (59.4, "59 s"), (59.7, "1:00"), (61, "1:01"), (600, "10:00"), (3599.6, "1:00:00"),
        (7325, "2:02:05"), (86399.8, "1 d 0 h"), (90000, "1 d 1 h"), (172700, "2 d 0 h"),
    ],
)  # fmt: skip
def test_since(seconds: float, said: str) -> None:
    assert since(seconds) == said


def test_names_units_and_shares() -> None:
    assert [named("loss", 0.5), named("tokens/s", 14122.0), named("GB", 0.664)] == [
        "loss 0.500",
        "14,122 tokens/s",
        "0.664 GB",
    ]
    assert (percent(0.125), percent(-0.5, 0.01)) == ("12.5 %", "−50.0 ± 1.0 %")
    assert bound_name("16") == "L₁₆"


def test_without_a_terminal_tables_get_the_width_they_want(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert output().width == 140
    monkeypatch.setenv("COLUMNS", "90")
    assert output().width == 90


def printed(grid: Grid, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(grid)
    return console.file.getvalue()  # pyright: ignore


def test_columns_go_in_their_order_and_none_is_cut() -> None:
    rows = [("a long name of some words", "12.5 ± 1.0 %", "1,234,567", "0.25")]
    grid = Grid(("name", "share", "tokens", "loss"), rows, words=("name",), drop=("tokens", "loss"))
    for width, heads in ((80, grid.heads), (44, ("name", "share", "loss")), (32, ("name", "share"))):
        said = printed(grid, width)
        assert said.split("\n")[1].split() == [*heads]
        assert "12.5 ± 1.0 %" in said and "…" not in said
        assert max(map(len, said.split("\n"))) <= width


def test_a_mark_is_explained_where_a_column_with_it_is_shown() -> None:
    grid = Grid(("name", "a", "b"), [("x", "1 †", "2")], drop=("a",), notes=["† loose", "all"])
    assert "† loose" in printed(grid, 40) and "all" in printed(grid, 40)
    assert "†" not in printed(grid, 9) and "all" in printed(grid, 9)


def test_cells_are_neither_markup_nor_commands() -> None:
    said = printed(Grid(("", ""), [("a[/b]", "[red]x\x1b[2J")], title="t[i]", notes=["n[/]\x07"]), 40)
    assert [line.rstrip() for line in said.splitlines()] == ["t[i]", "a[/b]  [red]x[2J", "n[/]"]
