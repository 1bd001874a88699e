"""Tables and verdicts: figures computed by hand, and no claim that they do not carry."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
from hand_made import em_row, results, row, save
from rich.console import Console

from latent_thoughts.stages.report import differences, headline, summary, table


def test_standard_errors_over_seeds(tmp_path: Path) -> None:
    found = results(tmp_path, [em_row(seed=s, accuracy=a) for s, a in ((0, 0.5), (1, 0.7), (2, 0.9))])
    mean = found.main("em")[-1].mean("accuracy")
    assert mean is not None and mean.n == 3
    assert mean.value == pytest.approx(0.7)
    assert mean.error == pytest.approx(0.2 / math.sqrt(3))  # deviations -0.2, 0, 0.2: variance 0.08 / 2
    shown = table.main_table(found)
    assert "70.0 ± 11.5 %" in shown.lines[-1][2]
    assert "± is the standard error over seeds (n = 3)." in shown.notes


def test_one_seed_shows_the_binomial_error_and_says_so(tmp_path: Path) -> None:
    shown = table.main_table(results(tmp_path, [em_row(accuracy=0.9)]))
    assert "90.0 ± 3.0 %" in shown.lines[0][2]  # sqrt(0.9 * 0.1 / 100)
    assert shown.notes[0] == "One seed: ± is the binomial standard error over 100 answers."
    shown = table.main_table(results(tmp_path, [em_row(accuracy=1.0), row("warm_start", accuracy=0.0)]))
    assert [cells[3] for *_, cells in shown.lines] == ["0.0 %", "100.0 %"]  # the error is not 0, but not known


def test_missing_figures_are_left_out_of_the_mean(tmp_path: Path) -> None:
    rows = [em_row(seed=0, accuracy=0.4), em_row(seed=1, accuracy=None), em_row(seed=2, accuracy=math.nan)]
    mean = results(tmp_path, rows).main("em")[-1].mean("accuracy")
    assert mean is not None and mean.value == pytest.approx(0.4)
    assert (
        table.main_table(results(tmp_path, [row("oracle", accuracy=None, bound_per_token=None)])).lines[0][2][3] == "–"
    )


def test_costs_of_em_count_from_the_warm_start_on(tmp_path: Path) -> None:
    found = results(tmp_path, [row("warm_start"), em_row(iteration=1), em_row(iteration=2)])
    last = found.main("em")[-1]
    tokens, seconds = last.spent("train_tokens"), last.spent("seconds.sample", "seconds.train")
    assert tokens is not None and tokens.value == 3000
    assert seconds is not None and seconds.value == 5 + 7 + 7


def test_the_same_row_twice_counts_once(tmp_path: Path) -> None:
    line = results(tmp_path, [em_row(accuracy=0.5), em_row(accuracy=0.5)]).main("em")[-1]
    assert line.mean("accuracy") == summary.Mean(0.5, math.sqrt(0.25 / 99), 100, "answers")


def test_lines_of_the_table(tmp_path: Path) -> None:
    rows = [row("oracle"), em_row(iteration=1), em_row(iteration=2), em_row(iteration=1, samples=8),
            em_row(iteration=2, samples=8), row("raw_tokens")]  # fmt: skip
    shown = table.main_table(results(tmp_path, rows))
    assert [(emphasis, cells[0], cells[1], cells[2]) for _, emphasis, cells in shown.lines] == [
        ("", "Raw text, same raw tokens", "", ""),
        ("dim", "EM", "1", "2"),
        ("strong", "EM", "2", "2"),  # K = 2 is the recipe's
        ("", "EM", "2", "8"),
        ("", "Oracle thoughts", "", ""),
    ]


def test_bounds_that_are_loose_are_marked(tmp_path: Path) -> None:
    rows = [row("warm_start", bound_unfinished={"1": 0.0, "4": 0.0}), em_row(bound_unfinished={"1": 0.125, "4": 0.004})]
    other = em_row(bound_unfinished={"1": 0.5, "4": 0.25}, variant="few")
    found = results(tmp_path, [*rows, other])
    shown = table.main_table(found)
    assert [cells[4:6] for *_, cells in shown.lines] == [["−1.000", "−0.500"], ["−1.000 †", "−0.500 †"]]
    (note,) = [note for note in shown.notes if note.startswith("†")]
    assert "About some chunks, up to 13 %, no thought came to an end" in note
    assert "count with the bound of the empty thought" in note  # and are not left out
    variants = table.variants_table(found)
    assert variants is not None and "About some chunks, up to 25 %," in variants.notes[-1]
    without = table.main_table(results(tmp_path, [row("warm_start"), em_row()]))
    assert not any("†" in text for text in [*without.notes, *without.lines[-1][2]])


def test_known_and_unknown_are_columns_only_where_there_is_data(tmp_path: Path) -> None:
    def heads(*rows: dict[str, Any]) -> list[str]:
        return [head for head, _ in table.main_table(results(tmp_path, list(rows))).heads]

    assert "Known" not in heads(em_row())
    assert {"Known", "Unknown"} <= set(heads(em_row(), row("oracle", accuracy_known=1.0, accuracy_unknown=0.5)))


def test_second_table_compares_k(tmp_path: Path) -> None:
    one = [em_row(iteration=n, samples=2) for n in (1, 2)]
    assert table.samples_table(results(tmp_path, one)) is None
    more = [em_row(iteration=n, samples=8, accuracy=0.8, sample_tokens=2400) for n in (1, 2)]
    shown = table.samples_table(results(tmp_path, one + more))
    assert shown is not None
    assert [cells for *_, cells in shown.lines] == [
        ["default", "2", "50.0 ± 5.0 %", "1200", "4"],
        ["default", "8", "80.0 ± 4.0 %", "4800", "4"],
    ]


@pytest.mark.parametrize(
    ("width", "kept"),
    [
        (60, ["Method", "Iter.", "K", "Accuracy", "Unknown", "L₄"]),
        (72, ["Method", "Iter.", "K", "Accuracy", "Known", "Unknown", "L₄"]),
        (140, "Method Iter. K Accuracy Known Unknown L₁ L₄ NLL Tokens Steps Seconds".split()),
    ],
)
def test_narrow_terminals_keep_iteration_accuracy_and_bound(tmp_path: Path, width: int, kept: list[str]) -> None:
    rows = [row("raw_tokens"), em_row(iteration=1), em_row(accuracy_known=1.0, accuracy_unknown=0.3)]
    console = Console(file=io.StringIO(), width=width)
    console.print(table.grid(table.main_table(results(tmp_path, rows))))
    assert console.file.getvalue().split("\n")[1].split() == kept  # pyright: ignore


@pytest.mark.parametrize(
    ("seconds", "head", "shown"),
    [(40.0, "Seconds", "40"), (200.0, "Minutes", "3.33"), (412_000.0, "Hours", "114"), (2.46e7, "Hours", "6,833")],
)
def test_times_have_the_unit_of_the_longest(tmp_path: Path, seconds: float, head: str, shown: str) -> None:
    spent = {"train": seconds}
    found = table.main_table(results(tmp_path, [row("raw_tokens", seconds=spent), row("oracle", seconds={"train": 1})]))
    assert found.heads[-1][0] == head
    assert found.lines[0][2][-1] == shown


@pytest.mark.parametrize(
    ("em", "rival", "words"),
    [
        ((0.9, 0.8, 0.85), (0.5, 0.5, 0.5), "EM is ahead of the warm start trained as long: +35.0 points"),
        ((0.5, 0.5, 0.5), (0.9, 0.8, 0.85), "EM is behind the warm start trained as long: −35.0 points"),
        ((0.9, 0.4, 0.6), (0.5, 0.5, 0.5), "Not settled between EM and the warm start trained as long: +13.3 points"),
        ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "Not settled between EM and the warm start trained as long: +0.0 points"),
    ],
)
def test_verdicts_claim_no_win_that_is_not_there(
    tmp_path: Path, em: tuple[float, ...], rival: tuple[float, ...], words: str
) -> None:
    rows = [em_row(seed=n, accuracy=a) for n, a in enumerate(em)]
    rows += [row("warm_start_matched", seed=n, accuracy=a) for n, a in enumerate(rival)]
    said = headline.headline(results(tmp_path, rows))
    assert said.verdicts[0].startswith(words)
    assert f"EM answers {100 * sum(em) / 3:.0f} % right, the warm start trained as long" in said.title


@pytest.mark.parametrize(
    ("share", "shown"),
    [
        (0.996, "99.6"),
        (1.0, "100"),
        (0.0, "0"),
        (0.004, "0.4"),
        (0.125, "13"),
        (0.175, "18"),
        (0.145, "15"),
        (0.5, "50"),
    ],
)
def test_shares_are_rounded_as_one_would_and_not_to_all_or_nothing(share: float, shown: str) -> None:
    assert summary.percents(share) == shown
    assert headline.amount(summary.Mean(share), "accuracy") == f"{shown} %"


def test_of_one_seed_nothing_is_said_but_of_its_answers(tmp_path: Path) -> None:
    said = headline.headline(results(tmp_path, [em_row(accuracy=0.9), row("oracle", accuracy=0.5)]))
    assert said.verdicts[0] == (
        "EM is ahead of oracle thoughts on these answers, one seed: +40.0 points "
        "(95 % interval over the answers +27.8 to +50.6 points)."
    )
    said = headline.headline(results(tmp_path, [em_row(accuracy=None), row("oracle", accuracy=None)]))
    assert said.verdicts[0].startswith("Not settled between EM and oracle thoughts: +0.000 nats per token (one seed")


def test_a_title_without_accuracy_says_what_is_better(tmp_path: Path) -> None:
    rows = [em_row(accuracy=None, nll_per_token=1.2), row("warm_start", accuracy=None)]
    assert headline.headline(results(tmp_path, rows)).title.startswith("Held-out likelihood: EM −0.500 nats per token")
    said = headline.headline(results(tmp_path, [{**r, "bound_per_token": None} for r in rows]))
    assert said.title == (
        "Loss on held-out text (lower is better): EM 1.200 nats per token, the warm start 1.250 nats per token"
    )


def test_difference_is_paired_by_seed(tmp_path: Path) -> None:
    rows = [em_row(seed=n, accuracy=a) for n, a in enumerate((0.9, 0.8, 0.85))]
    rows += [row("oracle", seed=n, accuracy=0.5) for n in (2, 1, 0)]
    found = results(tmp_path, rows)
    gap = differences.difference(found.main("em")[-1], found.single("oracle"), "accuracy")  # pyright: ignore
    assert gap is not None and (gap.higher, gap.seeds) == (3, 3)
    assert gap.value == pytest.approx(0.35)
    assert gap.interval is not None
    assert gap.interval[1] - gap.value == pytest.approx(4.302653 * 0.05 / math.sqrt(3))
    assert gap.value - gap.interval[0] == pytest.approx(4.302653 * 0.05 / math.sqrt(3))


@pytest.mark.parametrize(
    ("em", "rival", "n", "interval"),
    [  # Newcombe 1998, table II: (a) 56/70 and 48/80 and (h) 10/10 and 0/10, method 10
        ([56 / 70], [48 / 80], (70, 80), (0.0524, 0.3339)),
        ([1.0], [0.0], (10, 10), (0.6075, 1.0)),
        ([1.0], [0.0], (1, 1), (-0.1221, 1.0)),
        ([0.53125, 0.28125, 0.78125], [0.5, 0.25, 0.75], (32, 32), (-0.1082, 0.1690)),
    ],
)
def test_an_interval_is_no_narrower_than_that_of_the_answers(
    tmp_path: Path, em: list[float], rival: list[float], n: tuple[int, int], interval: tuple[float, float]
) -> None:
    rows = [em_row(seed=s, accuracy=a, accuracy_n=n[0]) for s, a in enumerate(em)]
    rows += [row("oracle", seed=s, accuracy=a, accuracy_n=n[1]) for s, a in enumerate(rival)]
    found = results(tmp_path, rows)
    gap = differences.difference(found.main("em")[-1], found.single("oracle"), "accuracy")  # pyright: ignore
    assert gap is not None and gap.interval == pytest.approx(interval, abs=1e-4)


def test_equal_gaps_of_likelihoods_have_no_interval(tmp_path: Path) -> None:
    rows = [em_row(seed=s, nll_per_token=1.3 + s / 10) for s in range(3)]
    rows += [row("oracle", seed=s, nll_per_token=1.2 + s / 10) for s in range(3)]
    found = results(tmp_path, rows)
    gap = differences.difference(found.main("em")[-1], found.single("oracle"), "nll_per_token")  # pyright: ignore
    assert gap is not None and gap.interval is None and not gap.settled


def test_without_em_iterations_it_says_so(tmp_path: Path) -> None:
    said = headline.headline(results(tmp_path, [row("warm_start"), row("raw_tokens")]))
    assert said.title == "Raw text answers 50 % right, the warm start 50 %"
    assert said.verdicts == ["No EM iteration has been evaluated yet."]


def test_a_run_without_rows_is_told(tmp_path: Path) -> None:
    told = "samples/em_2/iter_01/sample: none of 9 thoughts came to an end"
    shown = table.main_table(summary.load(save(tmp_path, [em_row(accuracy=0.9)], ended=[told])))
    assert shown.notes[-1] == f"Without a row: {told}."
