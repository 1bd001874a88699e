"""Which texts repeat an evaluation set: n-grams of words in common (13 by default, as in the GPT-3 report).

Texts are compared as words: Unicode NFKC, lower case (casefold), and runs of letters, digits and underscores;
punctuation, symbols and white space only part words. So "$1,000!" is the words 1 and 000. Chinese characters and kana,
which no spaces part, are words each. (Thai and its neighbours come in pieces too, parted by their vowel signs.)
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np

from latent_thoughts.config import Contamination, Data
from latent_thoughts.data import readers
from latent_thoughts.types import UserError

_ALONE = (
    "\u3005-\u3007\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff"
)
_RUN = re.compile(r"\w+")
_WORD = re.compile(rf"[{_ALONE}]|[^\W{_ALONE}]+")
FEWEST = 8  # words: fewer may stand in any text, so that rows of fewer are found as whole texts alone
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying by it loses nothing modulo 2**64


def words(text: str) -> list[str]:
    """The words that count. ASCII text, which most is, needs no normalisation."""
    if text.isascii():
        return _RUN.findall(text.lower())
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


class Overlap:
    """Finds the rows of named evaluation sets that share an n-gram of words with a text.

    An n-gram is kept as 64 bits of hash, at most 30 bytes a row that holds it. Two different n-grams are taken for the
    same with probability 2**-64 a pair: for ten million of them against a corpus of 10**11 words, one false match in
    twenty corpora. A row of fewer than n words is found where all of them stand in a row, and one of fewer than eight
    where they are the whole text. Rows without a word are never matched: `too_short` counts them by set.
    """

    def __init__(self, sets: Mapping[str, Iterable[str]], n: int = 13):
        self.n, self.names = n, list(sets)
        self.rows = dict.fromkeys(self.names, 0)
        self.too_short = dict.fromkeys(self.names, 0)
        self._sizes = set[int]()  # of the grams, in words
        found: list[tuple[np.ndarray, int, int]] = []
        for number, (name, texts) in enumerate(sets.items()):
            for row, text in enumerate(texts):
                size = min(n, len(split := words(text)))
                self.rows[name] += 1
                self.too_short[name] += not size
                found += [(np.unique(grams), number, row) for grams in _grams(split, {size})]
                self._sizes.add(size)
        sizes = [len(grams) for grams, _, _ in found]
        hashes = np.concatenate([np.zeros(0, np.uint64), *(grams for grams, _, _ in found)])
        order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[order]
        self._sets = np.repeat(np.array([s for _, s, _ in found], np.uint16), sizes)[order]
        self._rows = np.repeat(np.array([r for _, _, r in found], np.uint32), sizes)[order]
        bits = max(1, (8 * len(hashes)).bit_length())
        self._shift = np.uint64(64 - bits)
        self._may_be = np.zeros(2**bits, bool)  # by a hash's first bits: most others need not be searched for
        self._may_be[self._hashes >> self._shift] = True

    def matches(self, text: str) -> dict[str, set[int]]:
        """Evaluation set to the numbers (from 0) of its rows that share an n-gram with the text; none is empty."""
        split, found = words(text), dict[str, set[int]]()
        sizes = {size for size in self._sizes if size >= min(FEWEST, self.n) or size == len(split)}
        for grams in _grams(split, sizes):
            grams = np.unique(grams[self._may_be[grams >> self._shift]])
            stops = np.searchsorted(self._hashes, grams, side="right")
            for start, stop in zip(np.searchsorted(self._hashes, grams), stops, strict=True):
                for at in range(start, stop):
                    found.setdefault(self.names[self._sets[at]], set()).add(int(self._rows[at]))
        return found


def _grams(split: Sequence[str], sizes: Set[int]) -> Iterator[np.ndarray]:
    """Hashes of the runs of so many words, size by size: a polynomial of the words' own (Python's, salted)."""
    hashes = np.fromiter(map(hash, split), np.int64, len(split)).view(np.uint64)
    grams = np.zeros(len(split) + 1, np.uint64)
    for size in range(1, min(len(split), max(sizes, default=0)) + 1):
        grams = grams[:-1] * _BASE + hashes[size - 1 :]
        if size in sizes:
            yield grams


def load(config: Contamination) -> Overlap | None:
    """The evaluation sets that a recipe names; None where it names none. Raises UserError for one that is missing, and
    for one without a word, which nothing would repeat."""
    if not config.sets:
        return None
    overlap = Overlap({name: _texts(source) for name, source in _sources(config).items()}, config.n)
    for name, source in config.sets.items():
        if overlap.rows[name] == overlap.too_short[name]:
            raise UserError(f"{source} holds no text: correct contamination.sets.{name}")
    return overlap


def look(config: Contamination) -> None:
    """Raises UserError for a set that is missing."""
    for name, source in _sources(config).items():
        readers.files(source, f"contamination.sets.{name}")


def _sources(config: Contamination) -> dict[str, Data]:
    return {name: Data(source=source, split=config.split) for name, source in config.sets.items()}


def key(config: Contamination) -> list[Any]:
    """What a stage's key has of it: nothing where no set is named, else settings and the files' hashes.

    Raises UserError for a set that is missing.
    """
    if not config.sets:
        return []
    look(config)
    return [config.model_dump(), [file for source in _sources(config).values() for file in readers.hashes(source)]]


def _texts(source: Data) -> Iterator[str]:
    for row in readers.rows(source):
        yield "\n".join(_strings(row))


def _strings(value: Any) -> Iterator[str]:
    """All text in a row, columns in their order, lists and structs too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _strings(part)


class Tally:
    """Counts texts that repeat evaluation sets, and the evaluation rows that are repeated."""

    def __init__(self, overlap: Overlap | None):
        self.overlap = overlap
        self.texts: dict[str, int] = {}
        self.found: dict[str, set[int]] = {}

    def repeats(self, text: str) -> bool:
        """Whether the text repeats a row of any set; counted."""
        matches = self.overlap.matches(text) if self.overlap else {}
        for name, rows in matches.items():
            self.texts[name] = self.texts.get(name, 0) + 1
            self.found.setdefault(name, set()).update(rows)
        return bool(matches)

    def record(self) -> dict[str, Any]:
        """The figures as JSON has them, for a shard's counts."""
        return {"texts": self.texts, "rows": {name: sorted(rows) for name, rows in self.found.items()}}

    def add(self, record: Mapping[str, Any]) -> None:
        """Another tally's figures."""
        for name, count in record["texts"].items():
            self.texts[name] = self.texts.get(name, 0) + count
        for name, rows in record["rows"].items():
            self.found.setdefault(name, set()).update(rows)

    def counts(self, what: str) -> dict[str, int]:
        """For a manifest: texts that repeat a set, the rows of it that they repeat, and those that cannot be told."""
        found: dict[str, int] = {}
        for name in self.overlap.names if self.overlap else ():
            found[f"contaminated_{what}_{name}"] = self.texts.get(name, 0)
            found[f"evaluation_rows_repeated_{name}"] = len(self.found.get(name, ()))
            if self.overlap and (wordless := self.overlap.too_short[name]):
                found[f"evaluation_rows_without_words_{name}"] = wordless
        return found
