"""Figures of likelihood from score rows made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from latent_thoughts.stages.evaluate.likelihood import summary


def row(
    document: str, index: int, place: float, nll: float, bounds: dict[int, float], size: int = 10
) -> dict[str, Any]:
    return {
        "doc_id": document, "chunk_index": index, "place": place, "tokens": size, "characters": 4 * size,
        "bytes": 5 * size, "log_raw": -2 * nll, "log_thoughtless": -nll, "bounds": list(bounds.items()),
    }  # fmt: skip


ROWS = [
    row("a", 0, 0.0, 10.0, {1: -20.0, 4: -9.0}),
    row("a", 1, 0.5, 10.0, {1: -np.inf, 4: -5.0}),
    row("b", 0, 0.0, 20.0, {1: -22.0, 4: -21.0}, 20),
]


def test_every_unit_and_the_gain() -> None:
    found = summary(ROWS)
    assert (found["documents"], found["chunks"]) == (2, 3)
    assert found["nll_per_token"] == pytest.approx(1) and found["nll_raw_per_token"] == pytest.approx(2)
    assert found["nll_per_character"] == pytest.approx(1 / 4)
    assert found["nll_bits_per_byte"] == pytest.approx(1 / 5 / np.log(2))
    assert found["bound_4_per_token"] == pytest.approx(-35 / 40)
    assert found["bound_4_bits_per_byte"] == pytest.approx(35 / 200 / np.log(2))
    assert found["bound_1_unfinished"] == pytest.approx(1 / 3) and found["bound_4_unfinished"] == 0
    assert found["bound_1_per_token"] == pytest.approx(-42 / 30)
    assert found["gain_4_per_token"] == pytest.approx((1 + 5 - 1) / 40)
    assert found["gain_4_positive"] == pytest.approx(2 / 3)
    first, second = found["gain_4_by_place"]
    assert (first["from"], first["chunks"], first["gain_per_token"]) == (0.0, 2, pytest.approx(0))
    assert (second["from"], second["chunks"], second["gain_per_token"]) == (0.5, 1, pytest.approx(0.5))


def test_a_raw_model_stands_on_the_same_axis() -> None:
    rows = [{**r, "log_thoughtless": None, "bounds": [(k, r["log_raw"]) for k in (1, 4)]} for r in ROWS]
    found = summary(rows)
    assert found["bound_1_per_token"] == found["bound_4_per_token"] == -found["nll_per_token"]
    assert found["nll_per_token"] == found["nll_raw_per_token"] and found["gain_4_per_token"] == 0
