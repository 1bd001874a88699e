"""Lossless cutting of documents into chunks of whole sentences (method, section 2)."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from latent_thoughts.config import Chunking
from latent_thoughts.data.tokenizer import Codec
from latent_thoughts.types import Chunk, Document, ThoughtDocument, UserError

T = TypeVar("T")

SENTENCES = 2  # raise it when sentences end elsewhere: documents that are cut otherwise are prepared anew

# A sentence ends after its mark, closing quotes and the white space that follows, or after newlines. The first class
# lets the search skip what cannot be an end, six times as fast as without; what is looked behind for then says which
# end it may be, and keeps long rows of dots linear: only a row's first mark can begin the end of a sentence. Marks of
# Chinese, Arabic and Hindi need no white space.
_CLOSING = "”’)\\]»«›」』）】》〉"
_OPENERS = (  # words that begin sentences: before them an initial's dot, or that of "a.m.", may end one
    "A|An|And|As|At|But|By|Each|Find|For|From|He|Hence|How|If|In|It|Let|Now|On|She|So|The|Then|There|These|They|This"
    "|Thus|To|We|What|When"
)
_WHOLE = (  # the mark is no abbreviation's, and not of a number at a line's beginning; most words tell by their length
    r"(?:(?<=[a-z\d)]{3}.)(?<![fx]\.)"
    r"|(?<!\bv\.)(?<!\b(?:Dr|Mr|Ms|St|Eq|vs|cf)\.)(?<!\b(?:Mrs|Art|Fig|Sec|i\.e|e\.g)\.)(?<!Prof\.)(?<!\bapprox\.)"
    r"(?:(?<!\bNo\.)|(?!\s+\d))(?<!^\d\.)(?<!^[ \t\d]\d\.)(?<!^[ \t\d]{2}\d\.)(?<!^[ \t\d]{3}\d\.)"
    r"(?:(?<!\b[A-Z]\.)(?<!\b(?:Jr|Sr|Co)\.)(?<!\b(?:Inc|Ltd|[A-Za-z]\.[A-Za-z])\.)"
    rf"|(?=\s+(?:{_OPENERS})\b)))"
)
_ENDS = re.compile(
    rf"[.!?…。！？؟۔।॥\n](?:(?<=[.!?…])(?![\w,])(?<![.!?…]{{2}}){_WHOLE}[.!?…]*[\"'{_CLOSING}]*\s+(?:»\s+)?"
    rf"|(?<=[。！？؟۔।॥])[。！？؟۔।॥]*[{_CLOSING}]*\s*|(?<=\n)\s*)",
    re.MULTILINE,
)


def sentences(text: str) -> list[str]:
    """Sentences with their trailing white space, the first with what stands before it too; joined they equal the
    text."""
    begins = len(text) - len(text.lstrip())
    ends = [0, *[match.end() for match in _ENDS.finditer(text, begins)], len(text)]
    return [text[start:end] for start, end in itertools.pairwise(ends) if start < end]


def key(config: Chunking) -> list[Any]:
    """What a stage's key has of how it cuts."""
    return [config.model_dump(), SENTENCES]


def content_seed(text: str, seed: int) -> int:
    """A seed that depends on the document's content alone, not on shard, order or workers."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=str(seed).encode())
    return int.from_bytes(digest.digest(), "big")


def cut(document: Document, config: Chunking) -> list[str]:
    """Chunk texts of a document; joined they equal its text. An empty document has no chunks.

    A document's own pieces come as they are, empty ones too, since its thoughts are numbered by them.
    Poisson mode: lengths are 1 + Poisson(mean - 1) sentences, at most `max`.
    """
    if document.pieces is not None or config.mode == "pieces":
        if document.pieces is None:
            raise UserError(f"chunking.mode is pieces, but document {document.id} has none: set data.pieces")
        return list(document.pieces)
    if config.mode == "document":
        return [document.text] if document.text else []
    units = sentences(document.text)
    rng = np.random.default_rng(content_seed(document.text, config.seed))
    chunks: list[str] = []
    position = 0
    while position < len(units):
        drawn = 1 + rng.poisson(config.mean - 1) if config.mode == "poisson" else round(config.mean)
        length = min(int(drawn), config.max)
        chunks.append("".join(units[position : position + length]))
        position += length
    return chunks


def fit(
    text: str, encode: Callable[[str], list[int]], limit: int, longest: float = float("inf")
) -> list[tuple[str, list[int]]]:
    """Splits a chunk in halves, at white space where there is any, until each has at most `limit` ids.

    No token has more than `longest` characters: a text that cannot fit is not encoded to be told so.
    """
    if len(text) <= limit * longest:
        ids = encode(text)
        if len(ids) <= limit:
            return [(text, ids)]
        if len(text) < 2:
            raise UserError(f"one character is {len(ids)} tokens, more than chunking.max_tokens={limit}")
    at = _middle(text)
    return fit(text[:at], encode, limit, longest) + fit(text[at:], encode, limit, longest)


_SPACE_ENDS = re.compile(r"\s(?!\s)")


def _middle(text: str) -> int:
    """The end of white space that is nearest to the middle, of two the first; the middle where there is none."""
    middle, width = len(text) // 2, 64
    while True:
        low, high = max(0, middle - width), min(len(text), middle + width)
        ends = [low + m.end() for m in _SPACE_ENDS.finditer(text[low : high + 1])]
        ends = [end for end in ends if end < len(text) and abs(end - middle) < width]
        if ends:
            return min(ends, key=lambda end: abs(end - middle))
        if high - low == len(text) and width > middle + 1:
            return middle
        width *= 8


def chunked(document: Document, config: Chunking, codec: Codec) -> ThoughtDocument:
    """A document in tokenised chunks, without thoughts; the oracle's stay aside in `meta.oracle`.

    Raises UserError where a chunk does not fit and may not be split, or the tokenizer loses text.
    """
    found = next(all_chunked([document], config, codec))
    if isinstance(found, UserError):
        raise found
    return found


def all_chunked(documents: Sequence[Document], config: Chunking, codec: Codec) -> Iterator[ThoughtDocument | UserError]:
    """What `chunked` returns or raises for every document, their texts tokenised all at once."""
    pieces = [_or_error(cut, document, config) for document in documents]
    texts = [text for found in pieces if not isinstance(found, UserError) for text in found]
    encode = codec.ahead(text for text in texts if len(text) <= config.max_tokens * codec.longest)
    for document, found in zip(documents, pieces, strict=True):
        yield found if isinstance(found, UserError) else _or_error(_tokenised, document, found, config, codec, encode)


def _or_error(function: Callable[..., T], *arguments: Any) -> T | UserError:
    try:
        return function(*arguments)
    except UserError as error:
        return error


def _tokenised(
    document: Document, pieces: Sequence[str], config: Chunking, codec: Codec, encode: Callable[[str], list[int]]
) -> ThoughtDocument:
    chunks, start, first = [], 0, -1
    oracle: dict[int, str] = {}
    for piece_index, text in enumerate(pieces):
        if not text:
            continue
        if config.oversize == "refuse" and len(ids := encode(text)) > config.max_tokens:
            raise UserError(
                f"a chunk of {len(ids)} tokens is longer than chunking.max_tokens={config.max_tokens}: "
                "raise it, or set chunking.oversize=split"
            )
        first = len(chunks)  # of a piece that is split: its thought stands before all of it
        for part, ids in fit(text, encode, config.max_tokens, codec.longest):
            chunks.append(Chunk(document.id, len(chunks), start, part, tuple(ids)))
            start += len(part)
        if piece_index in document.thoughts:
            oracle[first] = document.thoughts[piece_index]
    joined = codec.decode([i for chunk in chunks for i in chunk.ids])
    if joined != document.text:
        raise UserError("the tokenizer does not give its text back (is it normalising?)")
    wanted = {"all": range(len(chunks)), "last": (first,), "given": oracle}[config.thoughts]
    target = tuple(n in wanted for n in range(len(chunks)))
    meta = {**document.meta, "oracle": oracle}
    return ThoughtDocument(document.id, tuple(chunks), ((),) * len(chunks), target, "raw", meta)
