"""Which texts repeat an evaluation set: n-grams of words in common (13 by default, as in the GPT-3 report).

Texts are compared as words: Unicode NFKC, lower case (casefold), and runs of letters, digits and underscores;
punctuation, symbols and white space only part words. So "$1,000!" is the words 1 and 000.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from latent_thoughts.config import Contamination, Data
from latent_thoughts.data import readers
from latent_thoughts.places import version

_WORD = re.compile(r"\w+")
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying by it loses nothing modulo 2**64


def words(text: str) -> list[str]:
    """The words that count. ASCII text, which most is, needs no normalisation."""
    return _WORD.findall(text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold())


class Overlap:
    """Finds the rows of named evaluation sets that share an n-gram of words with a text.

    An n-gram is kept as 64 bits of hash, 14 bytes a row that holds it. Two different n-grams are taken for the same
    with probability 2**-64 a pair: for ten million of them against a corpus of 10**11 words, one false match in
    twenty corpora. Rows of fewer than n words hold no n-gram and are never matched: `too_short` counts them by set.
    """

    def __init__(self, sets: Mapping[str, Iterable[str]], n: int = 13):
        self.n, self.names = n, list(sets)
        self.rows = dict.fromkeys(self.names, 0)
        self.too_short = dict.fromkeys(self.names, 0)
        found: list[tuple[np.ndarray, int, int]] = []
        for number, (name, texts) in enumerate(sets.items()):
            for row, text in enumerate(texts):
                grams = np.unique(self._grams(text))
                self.rows[name] += 1
                self.too_short[name] += not len(grams)
                found.append((grams, number, row))
        sizes = [len(grams) for grams, _, _ in found]
        hashes = np.concatenate([np.zeros(0, np.uint64), *(grams for grams, _, _ in found)])
        order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[order]
        self._sets = np.repeat(np.array([s for _, s, _ in found], np.uint16), sizes)[order]
        self._rows = np.repeat(np.array([r for _, _, r in found], np.uint32), sizes)[order]

    def _grams(self, text: str) -> np.ndarray:
        """Hashes of the n-grams, in order: a polynomial of the words' own hashes (Python's, salted a process)."""
        found = words(text)
        if len(found) < self.n:
            return np.zeros(0, np.uint64)
        hashes = np.fromiter(map(hash, found), np.int64, len(found)).view(np.uint64)
        grams = np.zeros(len(found) - self.n + 1, np.uint64)
        for offset in range(self.n):
            grams = grams * _BASE + hashes[offset : offset + len(grams)]
        return grams

    def matches(self, text: str) -> dict[str, set[int]]:
        """Evaluation set to the numbers (from 0) of its rows that share an n-gram with the text; none is empty."""
        if not len(self._hashes):
            return {}
        grams = self._grams(text)
        first = np.searchsorted(self._hashes, grams)
        hit = self._hashes[np.minimum(first, len(self._hashes) - 1)] == grams
        found: dict[str, set[int]] = {}
        for gram, start in zip(grams[hit], first[hit], strict=True):
            stop = start + np.searchsorted(self._hashes[start:], gram, side="right")
            for at in range(start, stop):
                found.setdefault(self.names[self._sets[at]], set()).add(int(self._rows[at]))
        return found


def load(config: Contamination) -> Overlap | None:
    """The evaluation sets that a recipe names; None where it names none. Raises UserError for one that is missing."""
    if not config.sets:
        return None
    return Overlap(dict(zip(config.sets, map(_texts, sources(config)), strict=True)), config.n)


def sources(config: Contamination) -> list[Data]:
    """Where the sets come from."""
    return [Data(source=source, split=config.split) for source in config.sets.values()]


def key(config: Contamination) -> list[Any]:
    """What a stage's key has of it: nothing where no set is named, else settings and the files' hashes."""
    if not config.sets:
        return []
    paths = [path for source in sources(config) for path in readers.files(source)]
    return [config.model_dump(), [[str(path), version(path)] for path in paths]]


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
        """For a manifest: texts that repeat a set, and the rows of it that they repeat."""
        found: dict[str, int] = {}
        for name in self.overlap.names if self.overlap else ():
            found[f"contaminated_{what}_{name}"] = self.texts.get(name, 0)
            found[f"evaluation_rows_repeated_{name}"] = len(self.found.get(name, ()))
        return found
