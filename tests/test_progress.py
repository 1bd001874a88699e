"""What long work shows."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from latent_thoughts import progress
from latent_thoughts.progress import Bars, Event, sent_to, track


def test_progress_goes_to_the_sink_and_ends_at_the_total() -> None:
    events: list[Event] = []
    with sent_to(events.append), track("work", 3, "chunks") as advance:
        for _ in range(3):
            advance(1, loss=2.0)
    assert (events[-1].work, events[-1].done, events[-1].total, events[-1].unit) == ("work", 3, 3, "chunks")
    assert events[-1].figures == "loss 2.00"


@pytest.mark.parametrize("total", [2.0, float("inf")])
def test_a_terminal_shows_work_with_and_without_an_end(monkeypatch: pytest.MonkeyPatch, total: float) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=screen, force_terminal=True, width=120))
    with track("prepare", total, "documents") as advance:
        advance(1)
        advance(1)
    assert "prepare" in screen.getvalue()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_count_and_times_are_whole_whatever_the_width(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """Only figures are cut; the bar, and then the rate, come with the room for them."""
    screen = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    monkeypatch.setattr(progress, "console", screen)
    bars = Bars()
    clock = iter(range(100))
    bars.progress.get_time = lambda: float(next(clock))
    for done in (10, 60, 126):
        bars.show("seed 0: ", Event("sample", done, 2000, "documents", "ess 1.77  accepted 0.600  gain 0.0149 [x]"))
    screen.print(bars.progress.get_renderable())
    line = screen.file.getvalue().rstrip("\n")  # pyright: ignore
    for part in ("seed 0: sample", "126/2000", " 0:00:", " left 0:00:", "ess 1.77"):
        assert part in line
    assert ("╸" in line or "━" in line) == (width >= 70)
    assert ("documents/s" in line) == (width >= 100)
    assert "\n" not in line and len(line) == width


def test_without_a_terminal_one_plain_line_a_piece_of_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "console", Console(file=io.StringIO(), force_terminal=False))
    with track("train", 2, "steps") as advance:
        advance(1)
        advance(1, loss=1.5)
    assert capsys.readouterr().err == "train: 2 steps  loss 1.50\n"
