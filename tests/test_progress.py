"""What long work shows."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from latent_thoughts import progress
from latent_thoughts.progress import Event, sent_to, track


def test_progress_goes_to_the_sink_and_ends_at_the_total() -> None:
    events: list[Event] = []
    with sent_to(events.append), track("work", 3, "chunks") as advance:
        for _ in range(3):
            advance(1, loss=2.0)
    assert (events[-1].work, events[-1].done, events[-1].total, events[-1].unit) == ("work", 3, 3, "chunks")
    assert events[-1].figures == "loss 2"


@pytest.mark.parametrize("total", [2.0, float("inf")])
def test_a_terminal_shows_work_with_and_without_an_end(monkeypatch: pytest.MonkeyPatch, total: float) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=screen, force_terminal=True, width=120))
    with track("prepare", total, "documents") as advance:
        advance(1)
        advance(1)
    assert "prepare" in screen.getvalue()


def test_without_a_terminal_one_plain_line_a_piece_of_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "console", Console(file=io.StringIO(), force_terminal=False))
    with track("train", 2, "steps") as advance:
        advance(1)
        advance(1, loss=1.5)
    assert capsys.readouterr().err == "train: 2 steps loss 1.5\n"
