"""Results kept one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latent_thoughts.journal import Journal


@given(st.dictionaries(st.text(), st.lists(st.integers()) | st.text()), st.integers(0, 60))
def test_a_journal_keeps_whole_lines_and_goes_on(
    tmp_path_factory: pytest.TempPathFactory, values: dict, cut: int
) -> None:
    path = tmp_path_factory.mktemp("journal") / "j.jsonl"
    journal = Journal(path)
    for key, value in values.items():
        journal.add(key, value)
    written = path.read_bytes() if values else b""
    path.write_bytes(written[: max(0, len(written) - cut)])
    again = Journal(path)
    assert list(again.known.items()) == list(values.items())[: len(again.known)]
    assert len(again.known) == path.read_bytes().count(b"\n") >= len(values) - cut
    for key, value in values.items():
        if key not in again.known:
            again.add(key, value)
    assert Journal(path).known == values


def test_a_journal_in_a_store_loses_what_was_not_put_and_goes_on(bucket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Journal, "FLUSH", 0.0)
    journal, values = Journal(bucket / "j.jsonl"), {f"key {n}": [n, "text\n"] for n in range(12)}
    for key, value in list(values.items())[:10]:
        journal.add(key, value)
    monkeypatch.setattr(Journal, "FLUSH", 1000.0)
    journal.add("key 10", "lost")
    again = Journal(bucket / "j.jsonl")
    assert again.known == dict(list(values.items())[:10])
    monkeypatch.setattr(Journal, "FLUSH", 0.0)
    for key in ("key 10", "key 11"):
        again.add(key, values[key])
    whole = Journal(bucket / "j.jsonl")
    assert whole.known == values
    whole.remove()
    assert Journal(bucket / "j.jsonl").known == {} and not list(bucket.glob("j*"))
