"""The built-in worlds, recomputed from their own thoughts."""

from __future__ import annotations

import functools
import re
from collections import Counter, defaultdict
from typing import Any, NamedTuple

import numpy as np
import pytest

from latent_thoughts.config import World
from latent_thoughts.data import worlds
from latent_thoughts.data.tokenizer import Codec, add_control_tokens, word_tokenizer
from latent_thoughts.types import Document, UserError

SMALL = World(documents=400, teacher_documents=60)
NAMES = ["castle", "hindsight", "stories"]


@functools.cache
def documents(name: str, seed: int = 0) -> list[Document]:
    return list(worlds.documents(name, size(name), seed))


def size(name: str, **values: Any) -> World:
    """Walks of the hindsight world come by three."""
    chain = 3 if name == "hindsight" else 1
    return SMALL.model_copy(update={"chain": chain, **values})


def split(name: str, which: str, seed: int = 0) -> list[Document]:
    return [d for d in documents(name, seed) if d.meta["split"] == which]


def problem(document: Document) -> str:
    """A document's question without its person."""
    assert document.pieces is not None
    person = document.pieces[0].split()[0]
    return re.sub(rf"\b{person}\b", "{}", document.pieces[0])


def problems(name: str, document: Document) -> list[str]:
    """What decides a document's answers, one by one."""
    if name != "hindsight":
        return [problem(document)]
    return [f"{walk.start} {' '.join(walk.moves)}" for walk in walks(document)]


class Walk(NamedTuple):
    start: str
    shown: list[str]  # of the question, "?" where a move is hidden
    moves: list[str]  # of the answer
    end: str
    rooms: list[str]  # of the thought


def walks(document: Document) -> list[Walk]:
    """The walks of a hindsight document, read from its pieces and thoughts; checks their form."""
    assert document.pieces is not None
    pieces, found = document.pieces, []
    person, start = re.match(r"(\w+) starts in (\w+) \. ", pieces[0]).groups()  # pyright: ignore[reportOptionalMemberAccess]
    for n, (question, answer) in enumerate(zip(pieces[::2], pieces[1::2], strict=True)):
        route = question.removeprefix(f"{person} starts in {start} . " if n == 0 else "then ").removesuffix(" . ")
        end, told = re.fullmatch(rf"so {person} ends in (\w+) by (.*) \. ?", answer).groups()  # pyright: ignore[reportOptionalMemberAccess]
        thought = document.thoughts[2 * n + 1].split()
        assert route.split()[::2] == told.split()[::2] == [str(k + 1) for k in range(len(thought) // 2)]
        assert told.split()[1::2] == thought[::2]
        found.append(Walk(start, route.split()[1::2], told.split()[1::2], end, thought[1::2]))
        start = end
    return found


def transitions(document: Document) -> list[tuple[str, str, str]]:
    """(room, move, next room) of a castle walk, by its question and thought alone."""
    assert document.pieces is not None
    room = document.pieces[0].split()[3]
    words = document.thoughts[1].split()
    found = []
    for move, after in zip(words[::2], words[1::2], strict=True):
        found.append((room, move, after))
        room = after
    return found


def test_castle_walks_follow_one_map_and_end_where_they_say() -> None:
    table: dict[tuple[str, str], str] = {}
    for document in documents("castle"):
        question, answer = document.pieces or ("", "")
        person, route = question.split()[0], question.split()[5:-1]
        steps = transitions(document)
        assert route == [word for n, (_, move, _) in enumerate(steps, 1) for word in (str(n), move)]
        assert answer == f"so {person} ends in {steps[-1][2]} ."
        for room, move, after in steps:
            assert table.setdefault((room, move), after) == after
    assert len(table) == 32
    for move in worlds.Castle.MOVES:
        assert {table[room, move] for room in worlds.Castle.ROOMS} == set(worlds.Castle.ROOMS)


def test_the_thought_is_not_in_the_castles_text() -> None:
    """Of the rooms on the way, only the first and the last are written."""
    for document in documents("castle"):
        written = {word for word in document.text.split() if word in worlds.Castle.ROOMS}
        steps = transitions(document)
        assert written == {steps[0][0], steps[-1][2]}


def test_hindsight_walks_follow_one_map_and_begin_where_the_one_before_ended() -> None:
    table: dict[tuple[str, str], str] = {}
    for document in documents("hindsight"):
        found = walks(document)
        assert len(found) == 3
        for walk in found:
            for room, move, after in zip([walk.start, *walk.rooms], walk.moves, walk.rooms, strict=False):
                assert table.setdefault((room, move), after) == after
            assert walk.rooms[-1] == walk.end
            assert all(shown in ("?", move) for shown, move in zip(walk.shown, walk.moves, strict=True))
    assert len(table) == 32


def test_hindsight_questions_hide_a_move_but_the_one_that_is_asked_hides_none() -> None:
    for document in documents("hindsight"):
        *before, last = walks(document)
        assert all(walk.shown.count("?") == 1 for walk in before)
        assert last.shown.count("?") == (document.meta["split"] != "held_out")


def test_who_sees_the_question_alone_cannot_know_the_hidden_move_or_the_answer() -> None:
    """The best guesses, by the whole map and by which walks documents are made of (a fifth is held out, so that some
    completions are known not to occur); who has read the answer is left with one thought."""
    moves, ends = defaultdict[str, set[str]](set), defaultdict[str, Counter[str]](Counter)
    thoughts = defaultdict[str, set[str]](set)
    training = [p for group in worlds.make("hindsight", 0).problems() for p in group if not worlds._held_out(p, 0, 0.2)]
    for found in training:
        route, rooms = found.thought.split()[::2], found.thought.split()[1::2]
        for hidden in range(len(route)):
            question = f"{found.begins} {[*route[:hidden], '?', *route[hidden + 1 :]]}"
            moves[question].add(route[hidden])
            ends[question][rooms[-1]] += 1
        thoughts[f"{found.begins} {route}"].add(found.thought)
    total = sum(found.total() for found in ends.values())
    assert total > 5000
    assert len(moves) / total < 1 / 3  # completions are equally likely: one guess a question is right
    assert sum(max(found.values()) for found in ends.values()) / total < 0.5
    assert all(len(found) == 1 for found in thoughts.values())


def test_which_move_is_hidden_does_not_depend_on_what_it_is() -> None:
    hidden, shown = Counter[str](), Counter[str]()
    for document in documents("hindsight"):
        for walk in walks(document)[:2]:
            for move, as_shown in zip(walk.moves, walk.shown, strict=True):
                (hidden if as_shown == "?" else shown)[move] += 1
    shares = [hidden[move] / (hidden[move] + shown[move]) for move in worlds.Castle.MOVES]
    assert max(shares) - min(shares) < 0.08


AMOUNTS = {"two": 2, "three": 3, "four": 4, "five": 5, "one": 1}
SIGNS = {"finds": 1, "wins": 1, "loses": -1, "gives": -1}


def test_stories_add_up() -> None:
    for document in documents("stories"):
        question, answer = document.pieces or ("", "")
        person, _, count, thing, _, _, *events = question.split(" . How many")[0].split()
        total, thought = int(count), ""
        for event in " ".join(events).split(" then "):
            verb, amount, *_ = event.split()
            change = SIGNS[verb] * AMOUNTS[amount]
            thought += f"{total} {'+' if change > 0 else '-'} {abs(change)} = {(total + change) % 20} . "
            total = (total + change) % 20
        assert document.thoughts == {1: thought}
        assert answer == f"Now {person} has {total} ."
        assert question.endswith(f"How many {thing} now ? ")


@pytest.mark.parametrize("name", NAMES)
def test_documents_are_question_and_answer(name: str) -> None:
    for document in documents(name):
        assert document.pieces is not None and len(document.pieces) == 2 * size(name).chain
        assert list(document.thoughts) == list(range(1, len(document.pieces), 2))
        assert "".join(document.pieces) == document.text
        assert "{}" not in document.text
    assert len({d.id for d in documents(name)}) == len(documents(name))
    assert len(split(name, "warm_start")) == 60 and len(split(name, "corpus")) == 400


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", [0, 5])
def test_held_out_problems_occur_nowhere_in_training(name: str, seed: int) -> None:
    held_out = [problems(name, d)[-1] for d in split(name, "held_out", seed)]
    before = {p for d in split(name, "held_out", seed) for p in problems(name, d)[:-1]}
    training = before.union(*(problems(name, d) for d in documents(name, seed) if d.meta["split"] != "held_out"))
    assert len(set(held_out)) == len(held_out) > 0
    assert training.isdisjoint(held_out)


@pytest.mark.parametrize("name", NAMES)
def test_the_held_out_share_is_of_all_problems(name: str) -> None:
    total = sum(len(group) for group in worlds.make(name, 0).problems())
    assert len(split(name, "held_out")) / total == pytest.approx(0.2, abs=0.04)
    none = World(documents=1, teacher_documents=0, held_out_share=0)
    assert all(d.meta["split"] != "held_out" for d in worlds.documents(name, none, 0))


def test_the_teacher_knows_the_share_of_facts_it_should_and_uses_no_other() -> None:
    config = World(documents=1, teacher_documents=1000)
    made = list(worlds.documents("castle", config, 0))
    taught = {step[:2] for d in made if d.meta["split"] == "warm_start" for step in transitions(d)}
    assert all(d.meta["known"] for d in made if d.meta["split"] == "warm_start")
    assert 20 < len(taught) <= round(0.8 * 32)
    for document in made:
        if document.meta["split"] == "held_out" and document.meta["known"]:
            assert {step[:2] for step in transitions(document)} <= taught


def test_the_teacher_knows_what_all_walks_of_its_documents_need() -> None:
    made = list(worlds.documents("hindsight", size("hindsight", documents=1, teacher_documents=400), 0))

    def steps(walk: Walk) -> set[tuple[str, str]]:
        return set(zip([walk.start, *walk.rooms[:-1]], walk.moves, strict=True))

    taught = {step for d in made if d.meta["split"] == "warm_start" for walk in walks(d) for step in steps(walk)}
    assert 20 < len(taught) <= round(0.8 * 32)
    for document in made:
        if document.meta["split"] == "held_out":  # by the walk that is asked, whatever came before it
            assert document.meta["known"] == (steps(walks(document)[-1]) <= taught)


def test_teacher_documents_are_known_in_every_world() -> None:
    for name in NAMES:
        assert all(d.meta["known"] for d in split(name, "warm_start"))
        assert not all(d.meta["known"] for d in split(name, "corpus"))


def test_most_of_the_castles_held_out_walks_need_a_fact_nobody_taught() -> None:
    """Else a model that learned nothing new could look good."""
    config = World(documents=1, teacher_documents=0)
    shares = []
    for seed in range(10):
        known = [d.meta["known"] for d in worlds.documents("castle", config, seed) if d.meta["split"] == "held_out"]
        shares.append(np.mean(known))
    assert 0.3 < np.mean(shares) < 0.5


@pytest.mark.parametrize("name", NAMES)
def test_all_texts_and_thoughts_are_words_of_the_world(name: str) -> None:
    tokenizer = word_tokenizer(worlds.make(name, 0).words())
    add_control_tokens(tokenizer)
    codec = Codec(tokenizer)
    assert len(tokenizer) == len(set(worlds.make(name, 0).words())) + 3 + 4  # no word twice
    for document in documents(name):
        pieces = [*(document.pieces or ()), *document.thoughts.values()]
        encoded = [codec.encode(piece) for piece in pieces]
        assert codec.decode([i for ids in encoded for i in ids]) == "".join(pieces)


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_decides_everything(name: str) -> None:
    assert list(worlds.documents(name, size(name), 3)) == list(worlds.documents(name, size(name), 3))
    assert [d.text for d in documents(name, 0)] != [d.text for d in documents(name, 1)]


def test_a_chain_with_no_beginning_is_refused() -> None:
    problem = worlds.Problem("", "", "", frozenset(), begins=1, ends=2)
    assert worlds._chain([[problem]], problem, 1, np.random.default_rng(0)) == [problem]
    with pytest.raises(UserError, match="ends where a problem begins: raise known_share"):
        worlds._chain([[problem]], problem, 2, np.random.default_rng(0))


@pytest.mark.parametrize("name", ["castle", "stories"])
def test_a_chain_of_problems_that_stand_alone_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="data.world.chain"):
        list(worlds.documents(name, size(name, chain=2), 0))


def test_a_single_walk_of_the_hindsight_world_says_where_it_starts() -> None:
    for document in worlds.documents("hindsight", size("hindsight", chain=1), 0):
        assert len(walks(document)) == 1


def test_castles_of_other_seeds_have_other_maps() -> None:
    assert (worlds.Castle(0).table != worlds.Castle(1).table).any()


def test_a_world_that_leaves_nothing_to_teach_or_to_train_on_is_refused() -> None:
    with pytest.raises(UserError, match="known_share"):
        list(worlds.documents("castle", World(documents=1, teacher_documents=1, known_share=0), 0))
    with pytest.raises(UserError, match="held_out_share"):
        list(worlds.documents("castle", World(documents=1, teacher_documents=0, held_out_share=1), 0))
