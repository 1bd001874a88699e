"""Built-in corpora: compressed documents whose hidden derivation is known.

Every world draws its facts and documents from one seed. A document has two pieces, question and
answer, and an oracle thought before the answer. The teacher's documents need only facts that the
teacher knows; `meta.known` tells whether a document does. Problems (what decides the answer) are
held out by hash, so that a held-out problem occurs in no training document.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from latent_thoughts.config import World
from latent_thoughts.types import Document, UserError

PEOPLE = (
    "ada ben cleo dee eli fay gus hana ivo june kai lena milo nora omar pia quin rosa sven tess uma vito wren yara zeno"
).split()


@dataclass(frozen=True)
class Problem:
    """Question and answer without the person's name; `{}` stands for it. `facts` are what it needs.

    `paraphrases` say the same in other words, by the method that would have had a teacher write them: of several, the
    person decides which.
    """

    question: str
    answer: str
    thought: str
    facts: frozenset[int]
    paraphrases: dict[str, tuple[str, ...]] = field(default_factory=dict)


class Generator(Protocol):
    fact_count: int

    def words(self) -> list[str]: ...

    def problems(self) -> Iterator[list[Problem]]:
        """All problems, in groups (by length) that documents are drawn from evenly."""
        ...


class Castle:
    """Walks through a castle nobody has mapped: 8 rooms x 4 moves, each move a permutation."""

    ROOMS = "attic cellar den gallery hall kitchen library tower".split()
    MOVES = "north east south west".split()
    LENGTHS = (2, 3, 4)

    def __init__(self, seed: int):
        rng = np.random.default_rng([seed, 1])
        self.table = np.stack([rng.permutation(len(self.ROOMS)) for _ in self.MOVES])
        self.fact_count = self.table.size

    def words(self) -> list[str]:
        numbers = [str(n + 1) for n in range(max(self.LENGTHS))]
        plain = [*PEOPLE, *self.ROOMS, *self.MOVES, *numbers, *"starts in so ends .".split()]
        return [word + " " for word in plain] + ["."]

    def problems(self) -> Iterator[list[Problem]]:
        for length in self.LENGTHS:
            routes = itertools.product(range(len(self.ROOMS)), *[range(len(self.MOVES))] * length)
            yield [self._problem(start, route) for start, *route in routes]

    def _problem(self, start: int, route: list[int]) -> Problem:
        room, thought, facts = start, "", set()
        for move in route:
            facts.add(room * len(self.MOVES) + move)
            room = int(self.table[move, room])
            thought += f"{self.MOVES[move]} {self.ROOMS[room]} "
        steps = " ".join(f"{n} {self.MOVES[move]}" for n, move in enumerate(route, 1))
        first, last = self.ROOMS[start], self.ROOMS[room]
        question, answer = f"{{}} starts in {first} . {steps} . ", f"so {{}} ends in {last} ."
        moves = " ".join(self.MOVES[move] for move in route)
        said = {  # the last sentence stays, since it is what held-out questions ask for
            "wrap_baseline": (
                f"in {first} {{}} starts . {steps} . {answer}",
                f"{{}} starts in {first} so {steps} {answer}",
                f"{steps} . {{}} starts in {first} . {answer}",
                f"{{}} starts in {first} . {moves} . {answer}",
            ),
            "wrap_cot": (f"{question}{thought}. {answer}",),
        }
        return Problem(question, answer, thought, frozenset(facts), said)


class Stories:
    """Short arithmetic stories in plain English that state only question and answer.

    A fact is what a verb does to a count between 0 and 19 (sums wrap around at 20).
    """

    THINGS = "apples books coins shells".split()
    SIZE = 20
    VERBS = {
        "finds two": 2, "finds three": 3, "wins five": 5, "loses one": -1, "loses three": -3, "gives four away": -4,
    }  # fmt: skip
    LENGTHS = (2, 3)

    def __init__(self, seed: int):
        self.fact_count = self.SIZE * len(self.VERBS)

    def words(self) -> list[str]:
        phrases = [word for phrase in self.VERBS for word in phrase.split()]
        numbers = [str(n) for n in range(self.SIZE)]
        plain = [*PEOPLE, *phrases, *numbers, *self.THINGS, *"has then now is = + - . How many ? Now".split()]
        return [word + " " for word in dict.fromkeys(plain)] + ["."]

    def problems(self) -> Iterator[list[Problem]]:
        for length in self.LENGTHS:
            routes = itertools.product(range(self.SIZE), *[range(len(self.VERBS))] * length)
            yield [self._problem(start, verbs) for start, *verbs in routes]

    def _problem(self, start: int, verbs: list[int]) -> Problem:
        names, amounts = list(self.VERBS), list(self.VERBS.values())
        count, thought, facts = start, "", set()
        thing = self.THINGS[(start + sum(verbs)) % len(self.THINGS)]
        for verb in verbs:
            facts.add(count * len(names) + verb)
            total = (count + amounts[verb]) % self.SIZE
            sign = "+" if amounts[verb] > 0 else "-"
            thought += f"{count} {sign} {abs(amounts[verb])} = {total} . "
            count = total
        happened = " then ".join(names[verb] for verb in verbs)
        question = f"{{}} has {start} {thing} . {{}} {happened} . How many {thing} now ? "
        return Problem(question, f"Now {{}} has {count} .", thought, frozenset(facts))


WORLDS: dict[str, type[Any]] = {"castle": Castle, "stories": Stories}


def make(name: str, seed: int) -> Generator:
    """Raises UserError for an unknown world."""
    if name not in WORLDS:
        raise UserError(f"there is no built-in world {name!r} (known: {', '.join(WORLDS)})")
    return WORLDS[name](seed)


def documents(name: str, config: World, seed: int) -> Iterator[Document]:
    """The teacher's documents, the corpus, and the held-out problems once each; `meta.split` tells which."""
    world, rng = make(name, seed), np.random.default_rng([seed, 3])
    known = set(rng.permutation(world.fact_count)[: round(config.known_share * world.fact_count)].tolist())
    groups = [[p for p in group] for group in world.problems()]
    held_out = [p for group in groups for p in group if _held_out(p, seed, config.held_out_share)]
    training = [[p for p in group if not _held_out(p, seed, config.held_out_share)] for group in groups]
    taught = [[p for p in group if p.facts <= known] for group in training]
    if config.teacher_documents and not all(taught):
        raise UserError("data.world: no problem of some length needs known facts alone: raise known_share")
    if not all(training):
        raise UserError("data.world: every problem of some length is held out: lower held_out_share")

    def draw(pool: list[list[Problem]]) -> Problem:
        group = pool[rng.integers(len(pool))]
        return group[rng.integers(len(group))]

    for n in range(config.teacher_documents):
        yield _document(f"teacher-{n:05}", "warm_start", draw(taught), known, rng)
    for n in range(config.documents):
        yield _document(f"corpus-{n:05}", "corpus", draw(training), known, rng)
    for n, problem in enumerate(held_out):
        yield _document(f"held-out-{n:05}", "held_out", problem, known, rng)


def _held_out(problem: Problem, seed: int, share: float) -> bool:
    digest = hashlib.sha256(f"{seed}\n{problem.question}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _document(name: str, split: str, problem: Problem, known: set[int], rng: np.random.Generator) -> Document:
    person = PEOPLE[rng.integers(len(PEOPLE))]
    question, answer = (text.replace("{}", person) for text in (problem.question, problem.answer))
    meta: dict[str, Any] = {"split": split, "known": problem.facts <= known}
    if problem.paraphrases:
        which = PEOPLE.index(person)
        said = {name: texts[which % len(texts)] for name, texts in problem.paraphrases.items()}
        meta["paraphrases"] = {name: text.replace("{}", person) for name, text in said.items()}
    return Document(name, question + answer, meta, (question, answer), {1: problem.thought})
