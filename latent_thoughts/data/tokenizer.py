"""Text to ids and back on any Hugging Face tokenizer, and the four control tokens."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from latent_thoughts.types import UserError

START, END, PRIOR, POSTERIOR = "<|latent_start|>", "<|latent_end|>", "<|latent_prior|>", "<|latent_posterior|>"
CONTROL_TOKENS = (START, END, PRIOR, POSTERIOR)
_SENTINELS = ("", "\n", "|", "a", "。")


@dataclass(frozen=True, slots=True)
class Controls:
    """Ids of the control tokens. A document starts with `bos`, or with `eos` where there is no BOS."""

    start: int
    end: int
    prior: int
    posterior: int
    bos: int
    eos: int

    @property
    def never_in_thoughts(self) -> frozenset[int]:
        """Ids that abort a thought: every control token but the end of the thought."""
        return frozenset({self.start, self.prior, self.posterior, self.eos, self.bos})


def add_control_tokens(tokenizer: Any) -> Controls:
    """Adds the four tokens where they are missing. Raises UserError for a tokenizer without EOS."""
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no end-of-sequence token: set one before training")
    tokenizer.add_tokens(list(CONTROL_TOKENS), special_tokens=True)
    return controls_of(tokenizer)


def controls_of(tokenizer: Any) -> Controls:
    """Raises UserError where the tokenizer lacks the four tokens (a model without thoughts)."""
    vocabulary = tokenizer.get_vocab()
    if missing := [token for token in CONTROL_TOKENS if token not in vocabulary]:
        raise UserError(f"the model has no thought tokens ({' '.join(missing)}): it was not trained on thoughts")
    ids = [vocabulary[token] for token in CONTROL_TOKENS]
    bos = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return Controls(*ids, bos=bos, eos=tokenizer.eos_token_id)


class Codec:
    """Encodes pieces of text separately, so that the joined ids decode to the joined text.

    Control-token strings in the text stay text. Tokenizers that add a space in front of every
    encoded string (SentencePiece) are given a sentinel in front, whose ids are cut off again.
    Strings they cannot tell from their own symbols (a literal ▁ from a space; </s> from the end of
    the sequence, where the model matches any word of its vocabulary) are spelled in byte tokens, or
    a character at a time.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.sentinels = [s for s in _SENTINELS if self._clean(s)]
        if not self.sentinels:
            raise UserError("the tokenizer does not give back the text it encodes: choose another one")
        self.head = self._ids(self.sentinels[0]) if self.sentinels[0] else []
        self.head_length = len(self._text(self.head))
        vocabulary = tokenizer.get_vocab()
        self.special = frozenset(tokenizer.all_special_ids) | {i for t, i in vocabulary.items() if t in CONTROL_TOKENS}
        self.longest = max(map(len, vocabulary))  # characters of a token, at most
        byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
        self.bytes = [vocabulary[t] for t in byte_tokens] if vocabulary.keys() >= set(byte_tokens) else None
        names = [*tokenizer.all_special_tokens, *CONTROL_TOKENS, *(byte_tokens if self.bytes else [])]
        # Whether one name is mistaken depends on what stands before it, so one that is condemns all.
        suspects = ["▁"] * self._mistakes("▁") + names * any(map(self._mistakes, names))
        self.mistaken = re.compile(f"({'|'.join(map(re.escape, suspects))})") if suspects else None

    def _ids(self, text: str | list[str]) -> Any:
        ids_alone = {"return_attention_mask": False, "return_token_type_ids": False}  # half of the time beside encoding
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, **ids_alone)["input_ids"]

    def _text(self, ids: Sequence[int]) -> str:
        if self.tokenizer.is_fast:  # transformers would look at every id in Python first
            return self.tokenizer.backend_tokenizer.decode(list(ids), skip_special_tokens=False)
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _clean(self, sentinel: str) -> bool:
        """Whether pieces encoded behind this sentinel join without a stray space."""
        words = [word for word in ("so", "dee ", " in", "is") if self._knows(word)]
        try:
            joined = [i for word in words for i in self._encode(word, sentinel)]
        except UserError:
            return False
        return self._text(self._ids(sentinel) + joined) == self._text(self._ids(sentinel)) + "".join(words)

    def _knows(self, text: str) -> bool:
        unknown = self.tokenizer.unk_token_id
        return unknown is None or unknown not in self._ids(text)

    def _encode(self, text: str, sentinel: str) -> list[int]:
        ids, head = self._ids(sentinel + text), self._ids(sentinel) if sentinel else []
        if ids[: len(head)] != head:
            raise UserError(f"cannot encode {text[:40]!r} apart from what precedes it")
        return ids[len(head) :]

    def _mistakes(self, text: str) -> bool:
        """Whether the text would be read as something else; refusing to encode it is no mistake."""
        try:
            ids = self._apart(text)
        except UserError:
            return False
        return self.decode(ids) != text or not self.special.isdisjoint(ids)

    def encode(self, text: str) -> list[int]:
        """Raises UserError where the text cannot be encoded on its own, or has unknown tokens."""
        if self.mistaken is None:
            return self._apart(text)
        ids = []
        for n, part in enumerate(self.mistaken.split(text)):
            ids += self._spell(part) if n % 2 else self._apart(part)
        return ids

    def ahead(self, texts: Iterable[str]) -> Callable[[str], list[int]]:
        """`encode`, with these texts encoded now, all in one call: by several threads within `on_all_cores`."""
        sentinel, head, unknown = self.sentinels[0], self.head, self.tokenizer.unk_token_id
        plain = [text for text in texts if text and not (self.mistaken and self.mistaken.search(text))]
        found = self._ids([sentinel + text for text in plain]) if plain else []
        known = {t: i[len(head) :] for t, i in zip(plain, found, strict=True) if i[: len(head)] == head}
        known = {text: ids for text, ids in known.items() if unknown is None or unknown not in ids}
        return lambda text: known[text] if text in known else self.encode(text)

    def _spell(self, text: str) -> list[int]:
        if self.bytes is not None:
            return [self.bytes[byte] for byte in text.encode()]
        return [i for character in text for i in self._apart(character)]

    def _apart(self, text: str) -> list[int]:
        if not text:
            return []
        error: UserError | None = None
        for sentinel in self.sentinels:
            try:
                ids = self._encode(text, sentinel)
            except UserError as failure:
                error = failure
                continue
            if self.tokenizer.unk_token_id is not None and self.tokenizer.unk_token_id in ids:
                raise UserError(f"the tokenizer does not know a word of {text[:60]!r}")
            return ids
        assert error is not None
        raise error

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, control tokens shown by name."""
        return self._text([*self.head, *ids])[self.head_length :]


@contextlib.contextmanager
def on_all_cores() -> Iterator[None]:
    """Tokenizers share the texts of a call out to threads meanwhile. (They look at this variable at every call; it is
    off else, so that forked processes are not warned of.)"""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def word_tokenizer(words: Sequence[str]) -> Any:
    """A word-level tokenizer over a closed vocabulary; a word keeps the space that follows it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<unk>", "<bos>", "<eos>", *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>", pad_token="<eos>"
    )
