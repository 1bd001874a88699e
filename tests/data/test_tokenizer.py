"""Pieces encoded apart join to the text, on every family of tokenizers; control tokens stay out of text."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from latent_thoughts.data.tokenizer import (
    CONTROL_TOKENS,
    START,
    Codec,
    add_control_tokens,
    controls_of,
    on_all_cores,
    word_tokenizer,
)
from latent_thoughts.types import UserError

CORPUS = [
    "The cat sat on the mat.\nIt said: hello world! | a b 。",
    "Numbers 12 and 345, don't you think? a\nb\n\nso is it  in the dee p",
] * 5
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIAL = ["<unk>", "<s>", "</s>"]
LLAMA_DECODER = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
WORDS = ["so ", "dee ", "in ", "is ", "it ", "."]


def byte_level() -> Any:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=350,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>", unk_token="<|endoftext|>")


def wrapped(core: Tokenizer) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def sentencepiece_bpe(prefix: str) -> Any:
    """Like Llama's: byte fallback, and a space in front of every encoded string."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    core.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    learned = json.loads(core.to_str())["model"]
    tokens = dict.fromkeys([*SPECIAL, *BYTES, *learned["vocab"]])
    model = models.BPE(
        vocab={token: n for n, token in enumerate(tokens)},
        merges=[tuple(merge) for merge in learned["merges"]],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    core = Tokenizer(model)
    if prefix == "normalizer":
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
    core.decoder = LLAMA_DECODER
    return wrapped(core)


def unigram() -> Any:
    """A model that matches any string of its vocabulary, special tokens and byte tokens included."""
    pieces = [(token, 0.0) for token in SPECIAL] + [(token, -9.0) for token in BYTES]
    pieces += [(piece, -4.0) for piece in ["▁", "▁the", "a", "b", "so", "is", "<", "/", "s", ">", "▁in", "▁so"]]
    core = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    core.decoder = LLAMA_DECODER
    return wrapped(core)


MAKERS = {
    "byte-level": byte_level,
    "llama, prepended by the normalizer": functools.partial(sentencepiece_bpe, "normalizer"),
    "llama, prepended always": functools.partial(sentencepiece_bpe, "always"),
    "llama, prepended first": functools.partial(sentencepiece_bpe, "first"),
    "unigram": unigram,
    "words": lambda: word_tokenizer(WORDS),
}
OPEN = [name for name in MAKERS if name != "words"]


@functools.cache
def tokenizer_of(name: str) -> Any:
    tokenizer = MAKERS[name]()
    add_control_tokens(tokenizer)
    return tokenizer


@functools.cache
def codec_of(name: str) -> Codec:
    return Codec(tokenizer_of(name))


def control_ids(name: str) -> set[int]:
    controls = controls_of(tokenizer_of(name))
    return {controls.start, controls.end, controls.prior, controls.posterior, controls.bos, controls.eos}


def round_trip(name: str, pieces: list[str]) -> None:
    codec = codec_of(name)
    encoded = [codec.encode(piece) for piece in pieces]
    assert [*map(codec.ahead(pieces), pieces)] == encoded
    assert codec.decode([i for ids in encoded for i in ids]) == "".join(pieces)
    for piece, ids in zip(pieces, encoded, strict=True):
        assert codec.decode(ids) == piece
        assert control_ids(name).isdisjoint(ids)


# Strings that tokenizers treat specially, between ordinary ones.
TRICKY = st.sampled_from(
    [*CONTROL_TOKENS, *SPECIAL, "<|endoftext|>", "<0x0A>", "▁", " ", "  ", "\n", " a", "a ", "the", "|", "。", "\r\n"]
)
PIECE = st.lists(st.one_of(TRICKY, st.text(st.characters(exclude_categories=["Cs"]), max_size=12)), max_size=4)


@pytest.mark.parametrize("name", OPEN)
@settings(max_examples=100, deadline=None)
@given(st.lists(PIECE.map("".join), max_size=4))
def test_pieces_encoded_apart_join_to_the_text(name: str, pieces: list[str]) -> None:
    round_trip(name, pieces)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.lists(st.sampled_from(WORDS[:-1]), max_size=5).map("".join), st.sampled_from(["", "."]))))
def test_words_join_to_the_text(pieces: list[tuple[str, str]]) -> None:
    round_trip("words", [words + stop for words, stop in pieces])


@pytest.mark.parametrize("name", OPEN)
@pytest.mark.parametrize("text", [*CONTROL_TOKENS, "</s>", "<s>", "<unk>", f"{START}<unk>", f"x {START} y"])
def test_control_strings_in_text_stay_text(name: str, text: str) -> None:
    round_trip(name, [text, " and ", text])


@pytest.mark.parametrize("text", [*CONTROL_TOKENS, "<eos>", "<bos>", "<unk>", "so unheard.", "so"])
def test_a_closed_vocabulary_refuses_what_is_not_in_it(text: str) -> None:
    with pytest.raises(UserError, match="does not know a word"):
        codec_of("words").encode(text)


@pytest.mark.parametrize("ahead", [["so unheard.", "so it.", "it is ."], ["so it is."], []])
def test_what_cannot_be_encoded_is_refused_when_it_is_asked_for(ahead: list[str]) -> None:
    codec = codec_of("words")
    encode = codec.ahead(ahead)
    assert encode("it is .") == codec.encode("it is .")
    with pytest.raises(UserError, match="does not know a word of 'so unheard"):
        encode("so unheard.")


@pytest.mark.parametrize("before", [None, "false"])
def test_all_cores_for_a_while(before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "TOKENIZERS_PARALLELISM"
    monkeypatch.setenv(name, before) if before else monkeypatch.delenv(name, raising=False)
    with pytest.raises(ZeroDivisionError), on_all_cores():
        assert os.environ[name] == "true"
        raise ZeroDivisionError
    assert os.environ.get(name) == before


@pytest.mark.parametrize("name", MAKERS)
def test_control_ids_are_shown_by_name_when_decoded(name: str) -> None:
    controls, codec = controls_of(tokenizer_of(name)), codec_of(name)
    word = codec.encode("so " if name == "words" else "so")
    shown = codec.decode([controls.start, controls.prior, *word, controls.end])
    assert shown.startswith("<|latent_start|><|latent_prior|>") and shown.endswith("<|latent_end|>")


@pytest.mark.parametrize("name", MAKERS)
def test_empty_text_has_no_ids(name: str) -> None:
    assert codec_of(name).encode("") == []
    assert codec_of(name).decode([]) == ""


@pytest.mark.parametrize("name", MAKERS)
def test_a_saved_tokenizer_encodes_the_same(name: str, tmp_path: Path) -> None:
    tokenizer_of(name).save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert controls_of(again) == controls_of(tokenizer_of(name))
    text = "so is it ." if name == "words" else f"so is\n {START}it</s>. é"
    assert Codec(again).encode(text) == codec_of(name).encode(text)


def test_byte_level_ids_are_the_tokenizers_own() -> None:
    text = "The cat sat on the mat."
    assert codec_of("byte-level").encode(text) == tokenizer_of("byte-level")(text)["input_ids"]


def test_a_broken_character_among_sampled_bytes_does_not_eat_its_neighbours() -> None:
    codec = codec_of("llama, prepended first")
    tail = codec.encode("𝄞")[2:]  # the end of a character whose beginning was not sampled
    assert codec.decode([*tail, *codec.encode(" the cat")]).endswith(" the cat")


def test_adding_control_tokens_twice_changes_nothing() -> None:
    tokenizer = byte_level()
    first = add_control_tokens(tokenizer)
    size = len(tokenizer)
    assert add_control_tokens(tokenizer) == first
    assert len(tokenizer) == size


def test_a_document_starts_with_bos_or_else_with_eos() -> None:
    assert controls_of(tokenizer_of("unigram")).bos == tokenizer_of("unigram").bos_token_id
    assert controls_of(tokenizer_of("byte-level")).bos == tokenizer_of("byte-level").eos_token_id


@pytest.mark.parametrize("name", MAKERS)
def test_every_control_but_the_end_aborts_a_thought(name: str) -> None:
    controls = controls_of(tokenizer_of(name))
    assert controls.never_in_thoughts == control_ids(name) - {controls.end}


def test_a_tokenizer_without_eos_is_refused() -> None:
    core = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    with pytest.raises(UserError, match="end-of-sequence"):
        add_control_tokens(PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>"))


def test_a_model_without_thought_tokens_is_refused() -> None:
    with pytest.raises(UserError, match=r"no thought tokens .*latent_start.*not trained on thoughts"):
        controls_of(byte_level())


def test_a_tokenizer_that_loses_text_is_refused() -> None:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    add_control_tokens(tokenizer)
    with pytest.raises(UserError, match="does not give back"):
        Codec(tokenizer)


@pytest.mark.parametrize("name", ["byte-level", "llama, prepended first"])
@pytest.mark.parametrize("text", ["it is so", f"it is {START} so", START])
def test_control_tokens_do_not_change_how_text_is_encoded(name: str, text: str) -> None:
    """A model has read such strings in its pretraining, as the pieces they had then."""
    before = MAKERS[name]()
    ids = before(f"\n{text}", add_special_tokens=False)["input_ids"]
    assert codec_of(name).encode(text) == ids[len(before("\n", add_special_tokens=False)["input_ids"]) :]
