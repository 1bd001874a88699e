"""What is shown before a teacher is asked (whether it is asked: tests/teachers/test_synthesize.py)."""

from __future__ import annotations

import pytest

from latent_thoughts.approve import approval
from latent_thoughts.config.synthesize import Prices
from latent_thoughts.stages.synthesize.asking import Estimate


def test_brackets_in_a_teachers_name_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    approval(True)(Estimate("chunks", "models/a[/b] (openai)", False, 1, 1, 1, 1, 1, Prices(), 0.0, None))
    assert "models/a[/b]" in capsys.readouterr().err
