"""What is counted and shown of questions that the training data repeats."""

from __future__ import annotations

from typing import Any

from latent_thoughts.stages.evaluate import repeated


def rows(found: dict[str, set[str]] | None) -> list[dict[str, Any]]:
    made = [{"question_id": q, "repeated": None} for q in "abcd" for _ in range(2)]
    if found is not None:
        repeated.mark(made, found)
    return made


def test_what_was_found_for_any_seed_counts() -> None:
    first = rows({"text": {"a"}, "thoughts": set(), "too_short": {"d"}})
    second = rows({"text": {"a"}, "thoughts": {"a", "b"}, "too_short": {"d"}})
    assert repeated.clean(first) == {"b", "c"} and repeated.clean([*first, *second]) == {"c"}
    counts = repeated.counts([*first, *second])
    assert counts is not None and {what: c["questions"] for what, c in counts.items()} == {
        "text": 1, "thoughts": 2, "too_short": 1
    }  # fmt: skip
    assert repeated.shown(counts) == "text: 1 of 4, thoughts: 2 of 4, too short to tell: 1 of 4"
    assert repeated.shown(repeated.counts(rows({"text": {"a"}, "thoughts": set(), "too_short": set()}))) == (
        "text: 1 of 4, thoughts: 0 of 4"
    )


def test_where_one_was_not_searched_nothing_is_known() -> None:
    searched = rows({"text": set(), "thoughts": set(), "too_short": set()})
    assert repeated.counts([*searched, *rows(None)]) is repeated.clean([*searched, *rows(None)]) is None
    assert repeated.shown(None) == "not checked"
