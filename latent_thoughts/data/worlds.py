"""Built-in corpora: compressed documents whose hidden derivation is known.

Every world draws its facts and documents from one seed. A document has a question and an answer, or
several in a chain, each a piece, and an oracle thought before every answer. The teacher's documents
need only facts that the teacher knows; `meta.known` tells whether a document does (a held-out one:
whether its last answer does, which is the one that is asked for). Problems (what decides the answer)
are held out by hash, so that a held-out problem occurs in no training document.
"""

from __future__ import annotations

import hashlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

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
    person decides which. In a chain a problem begins in the state in which the one before it ended.
    """

    question: str
    answer: str
    thought: str
    facts: frozenset[int]
    paraphrases: dict[str, tuple[str, ...]] = field(default_factory=dict)
    begins: int = 0
    ends: int = 0


class Generator(ABC):
    fact_count: int
    chains = False  # whether problems can follow each other in a document

    @abstractmethod
    def __init__(self, seed: int): ...

    @abstractmethod
    def words(self) -> list[str]: ...

    @abstractmethod
    def problems(self) -> Iterator[list[Problem]]:
        """All problems, in groups (by length) that documents are drawn from evenly."""

    def write(self, chain: Sequence[Problem], asked: bool, rng: np.random.Generator) -> Iterator[tuple[str, str]]:
        """Question and answer of each problem of a document; `asked` where models are asked for the last."""
        for problem in chain:
            yield problem.question, problem.answer


class Castle(Generator):
    """Walks through a castle nobody has mapped: 8 rooms x 4 moves, each move a permutation."""

    ROOMS = "attic cellar den gallery hall kitchen library tower".split()
    MOVES = "north east south west".split()
    LENGTHS = (2, 3, 4)
    PHRASES = "starts in so ends ."

    def __init__(self, seed: int):
        rng = np.random.default_rng([seed, 1])
        self.table = np.stack([rng.permutation(len(self.ROOMS)) for _ in self.MOVES])
        self.fact_count = self.table.size

    def words(self) -> list[str]:
        numbers = [str(n + 1) for n in range(max(self.LENGTHS))]
        plain = [*PEOPLE, *self.ROOMS, *self.MOVES, *numbers, *self.PHRASES.split()]
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
        steps = _numbered(self.MOVES[move] for move in route)
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
        return Problem(question, answer, thought, frozenset(facts), said, start, room)


def _numbered(words: Iterable[str]) -> str:
    return " ".join(f"{n} {word}" for n, word in enumerate(words, 1))


class Hindsight(Castle):
    """Walks through the castle whose questions hide a move, in a chain each from where the one before it ended.

    One move of a walk, whichever it is, is `?` in the question. The answer names the room first and then the whole
    route. So what a question shows does not settle the answer, and only who has read the answer knows which walk the
    thought must retrace. What is asked of a model, the last walk of a held-out document, hides nothing: its answer
    is settled by its question and by the room where the walk before it ended, which the text says.
    """

    PHRASES = f"{Castle.PHRASES} by then ?"
    chains = True

    def _problem(self, start: int, route: list[int]) -> Problem:
        return replace(super()._problem(start, route), paraphrases={})  # they would tell what is hidden

    def write(self, chain: Sequence[Problem], asked: bool, rng: np.random.Generator) -> Iterator[tuple[str, str]]:
        for n, problem in enumerate(chain, 1):
            moves = problem.thought.split()[::2]
            hidden = None if asked and n == len(chain) else rng.integers(len(moves))
            shown = ["?" if place == hidden else move for place, move in enumerate(moves)]
            start = "then" if n > 1 else f"{{}} starts in {self.ROOMS[problem.begins]} ."
            more = " " if n < len(chain) else ""
            yield (
                f"{start} {_numbered(shown)} . ",
                f"so {{}} ends in {self.ROOMS[problem.ends]} by {_numbered(moves)} .{more}",
            )


class Stories(Generator):
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


WORLDS: dict[str, type[Generator]] = {"castle": Castle, "hindsight": Hindsight, "stories": Stories}


def make(name: str, seed: int) -> Generator:
    """Raises UserError for an unknown world."""
    if name not in WORLDS:
        raise UserError(f"there is no built-in world {name!r} (known: {', '.join(WORLDS)})")
    return WORLDS[name](seed)


def documents(name: str, config: World, seed: int) -> Iterator[Document]:
    """The teacher's documents, the corpus, and the held-out problems once each; `meta.split` tells which."""
    world, rng = make(name, seed), np.random.default_rng([seed, 3])
    if config.chain > 1 and not world.chains:
        raise UserError(f"data.world.chain: problems of the world {name!r} stand alone")
    known = set(rng.permutation(world.fact_count)[: round(config.known_share * world.fact_count)].tolist())
    groups = [[p for p in group] for group in world.problems()]
    held_out = [p for group in groups for p in group if _held_out(p, seed, config.held_out_share)]
    training = [[p for p in group if not _held_out(p, seed, config.held_out_share)] for group in groups]
    taught = [[p for p in group if p.facts <= known] for group in training]
    if config.teacher_documents and not all(taught):
        raise UserError("data.world: no problem of some length needs known facts alone: raise known_share")
    if not all(training):
        raise UserError("data.world: every problem of some length is held out: lower held_out_share")
    for n in range(config.teacher_documents):
        chain = _chain(taught, _draw(taught, rng), config.chain, rng)
        yield _document(world, f"teacher-{n:05}", "warm_start", chain, known, rng)
    for n in range(config.documents):
        chain = _chain(training, _draw(training, rng), config.chain, rng)
        yield _document(world, f"corpus-{n:05}", "corpus", chain, known, rng)
    for n, problem in enumerate(held_out):
        chain = _chain(training, problem, config.chain, rng)
        yield _document(world, f"held-out-{n:05}", "held_out", chain, known, rng)


Pool = list[list[Problem]]  # by length


def _held_out(problem: Problem, seed: int, share: float) -> bool:
    digest = hashlib.sha256(f"{seed}\n{problem.question}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _draw(pool: Pool, rng: np.random.Generator) -> Problem:
    group = pool[rng.integers(len(pool))]
    return group[rng.integers(len(group))]


def _chain(pool: Pool, last: Problem, length: int, rng: np.random.Generator) -> list[Problem]:
    """A document's problems, drawn backwards from its last one."""
    chain = [last]
    while len(chain) < length:
        before = [found for group in pool if (found := [p for p in group if p.ends == chain[0].begins])]
        if not before:
            raise UserError("data.world: nothing that may be drawn ends where a problem begins: raise known_share")
        chain.insert(0, _draw(before, rng))
    return chain


def _document(
    world: Generator, name: str, split: str, chain: list[Problem], known: set[int], rng: np.random.Generator
) -> Document:
    asked = split == "held_out"
    person = PEOPLE[rng.integers(len(PEOPLE))]
    written = world.write(chain, asked, rng)
    pieces = tuple(text.replace("{}", person) for pair in written for text in pair)
    thoughts = {2 * n + 1: problem.thought for n, problem in enumerate(chain)}
    facts = frozenset[int]().union(*(problem.facts for problem in (chain[-1:] if asked else chain)))
    meta: dict[str, Any] = {"split": split, "known": facts <= known}
    if chain[-1].paraphrases:
        which = PEOPLE.index(person)
        said = {name: texts[which % len(texts)] for name, texts in chain[-1].paraphrases.items()}
        meta["paraphrases"] = {name: text.replace("{}", person) for name, text in said.items()}
    return Document(name, "".join(pieces), meta, pieces, thoughts)
