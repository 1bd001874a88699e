"""Prompt files: the built-in ones, a user's own, and what is wrong with one, in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latent_thoughts.teachers import prompts
from latent_thoughts.types import UserError

ONE = "name: mine\nversion: 1\nmessages:\n  - role: user\n    content: "


def refusal(folder: Path, text: str, method: str = "latent_thoughts") -> str:
    (folder / "mine.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        prompts.load(method, [str(folder / "mine.yaml")])
    assert "\n" not in str(caught.value) and "mine.yaml" in str(caught.value)
    return str(caught.value)


def test_every_method_has_its_prompts() -> None:
    found = {method: [p.name for p in prompts.load(method, [])] for method in prompts.BUILT_IN}
    assert found == prompts.BUILT_IN and len(found["wrap_baseline"]) == 4
    everything = [p for method in prompts.BUILT_IN for p in prompts.load(method, [])]
    assert len({p.hash for p in everything}) == len(everything)


def test_mistakes_in_a_prompt(tmp_path: Path) -> None:
    assert "unknown field {chunks}" in refusal(tmp_path, ONE + '"{chunks} {chunk}"')
    assert "known: {chunk}, {context}" in refusal(tmp_path, ONE + '"{document}"')
    assert "unknown field {chunk.text}" in refusal(tmp_path, ONE + '"{chunk.text}"')
    assert "unknown field {chunk!r}" in refusal(tmp_path, ONE + '"{chunk!r}"')
    assert "unknown field {}" in refusal(tmp_path, ONE + '"{} {chunk}"')
    assert "put {chunk} in a message" in refusal(tmp_path, ONE + '"{context}"')
    assert "put {document} in a message" in refusal(tmp_path, ONE + '"none"', "wrap_cot")
    assert "write {{ and }} for braces" in refusal(tmp_path, ONE + '"{chunk"')
    assert "not valid YAML" in refusal(tmp_path, "a: [")
    assert "messages.0.role" in refusal(tmp_path, ONE.replace("user", "boss") + '"{chunk}"')
    assert "unknown key messages.0.contents" in refusal(tmp_path, ONE.replace("content", "contents") + '"{chunk}"')
    assert "mapping" in refusal(tmp_path, "- a")
    with pytest.raises(UserError, match=r"nowhere\.yaml does not exist"):
        prompts.load("latent_thoughts", [str(tmp_path / "nowhere.yaml")])


@given(chunk=st.text(min_size=1), context=st.text())
def test_text_goes_in_as_it_is(chunk: str, context: str) -> None:
    (prompt,) = prompts.load("latent_thoughts", [])
    question = prompt.fill({"chunk": chunk, "context": context})[-1]["content"]
    assert f"Context:\n{context or prompt.nothing}\n\nPassage:\n{chunk}\n" in question


def test_copies_are_the_same_prompts_and_changed_ones_are_left_alone(tmp_path: Path) -> None:
    assert len(prompts.copy_to(tmp_path)) == 6
    copies = {m: [str(tmp_path / f"{n}.yaml") for n in names] for m, names in prompts.BUILT_IN.items()}
    for method, paths in copies.items():
        assert [p.hash for p in prompts.load(method, paths)] == [p.hash for p in prompts.load(method, [])]
    (tmp_path / "wrap_qa.yaml").write_text(ONE + '"{document}"')
    assert prompts.copy_to(tmp_path) == []
    assert prompts.load("wrap_baseline", [str(tmp_path / "wrap_qa.yaml")])[0].name == "mine"


def test_nothing_stands_for_an_empty_context_alone() -> None:
    (prompt,) = prompts.load("latent_thoughts", [])
    (_, question) = prompt.fill({"context": "", "chunk": ""})
    assert question["content"].count(prompt.nothing) == 1
