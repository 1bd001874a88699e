"""What a recipe will cost before anything runs: tokens, FLOPs, device-hours, money and disk of every stage.

    latent-thoughts plan recipe.yaml

Work is counted in FLOPs of matrix products with the model's weights (2 a parameter and token, 6 in training) and of
attention; time is work over the rate that a device reaches at that kind of work.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from latent_thoughts.config import OWN_RAW_MODEL, Recipe, Sample, Synthesize, Train
from latent_thoughts.config.base import parse
from latent_thoughts.em.loop import with_preset
from latent_thoughts.em.run import PARAPHRASES, Run
from latent_thoughts.model import idle_weights
from latent_thoughts.scale.survey import CONTROLS, Split, Survey
from latent_thoughts.stages.synthesize.asking import REPLY_SHARE, price
from latent_thoughts.stages.synthesize.questions import CHARACTERS_A_TOKEN
from latent_thoughts.teachers import prompts

FILL = 0.97  # share of a packed row that is used (docs/results.md)


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's size where it costs: weights that a token is multiplied with, and attention."""

    body: int  # parameters of the layers
    head: int
    embedding: int  # 0 where it is the head
    attention: int  # layers x heads x head width
    idle: float = 0.0  # of the body, those of experts that a token is not sent to

    @classmethod
    def of(cls, model: Any) -> Shape:
        """Of a causal LM, also of one on torch's meta device."""
        config, head = model.config.get_text_config(), model.get_output_embeddings().weight
        embedding = model.get_input_embeddings().weight
        body = sum(p.numel() for p in model.parameters() if p is not head and p is not embedding)
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            body,
            head.numel(),
            0 if head is embedding else embedding.numel(),
            config.num_hidden_layers * config.num_attention_heads * width,
            idle_weights(model),
        )

    @property
    def parameters(self) -> int:
        return self.body + self.head + self.embedding

    def forward(self, tokens: float, keys: float, logits: bool) -> float:
        """FLOPs of tokens that each attend to `keys` keys in the mean."""
        return tokens * (2 * (self.body - self.idle + self.head * logits) + 4 * self.attention * keys)


@dataclass(frozen=True, slots=True)
class Device:
    """FLOP/s that a device reaches at each kind of work."""

    name: str
    train: float
    encode: float  # prompts, and the scoring of given tokens
    decode: float  # a token a draw a pass
    price: float = 0.0  # an hour
    source: str = ""

    @classmethod
    def with_shares(
        cls, name: str, peak: float, train: float, encode: float, decode: float, price: float, source: str
    ) -> Device:
        return cls(name, peak * train, peak * encode, peak * decode, price, source)


ASSUMED = "assumed: dense bf16 peak of the data sheet, shares {:.0%} train, {:.0%} encode, {:.0%} decode"
SHARES = (0.40, 0.40, 0.08)
DEVICES = {
    name: Device.with_shares(name, peak, *SHARES, price, ASSUMED.format(*SHARES))
    for name, peak, price in (
        ("h200", 989e12, 3.8),
        ("h100", 989e12, 3.0),
        ("a100", 312e12, 1.8),
        ("l40s", 362e12, 1.0),
        ("rtx4090", 165e12, 0.5),
    )
}
# measured with SmolLM2-135M in bf16 on 2 cores, without and with a matrix unit (AMX) in them (docs/results.md, Speed)
CPU_SHARES, MATRIX_CPU_SHARES = (0.50, 0.51, 0.28), (0.18, 0.16, 0.08)


@dataclass(frozen=True, slots=True)
class Work:
    """One stage of a run. Tokens are those that pass through the model."""

    stage: str
    train_tokens: float = 0.0
    raw_tokens: float = 0.0  # of the trained ones, those of text (neither thoughts nor control tokens)
    encode_tokens: float = 0.0
    decode_tokens: float = 0.0
    train_flops: float = 0.0
    encode_flops: float = 0.0
    decode_flops: float = 0.0
    asked_tokens: float = 0.0  # prompts to a teacher
    replied_tokens: float = 0.0
    money: float = 0.0  # for the teacher
    bytes: float = 0.0  # that stay on disk

    @property
    def flops(self) -> float:
        return self.train_flops + self.encode_flops + self.decode_flops

    def seconds(self, device: Device) -> float:
        """On one device."""
        return self.train_flops / device.train + self.encode_flops / device.encode + self.decode_flops / device.decode


def works(recipe: Recipe, found: Survey, shape: Shape) -> list[Work]:
    """Every stage of `latent-thoughts em`, in the order they run."""
    return list(_Planner(recipe, found, shape).run())


def _visit(config: Train, split: Split, thoughts: bool) -> tuple[float, float]:
    """Mean tokens of a visit to a document, with its thoughts or raw, and those of text among them."""
    raw, text = split.raw_length, split.text_length
    if not thoughts or config.layout == "raw":
        return raw, text
    shown = 1 - config.raw_share
    if config.layout == "thoughts":  # in place of their chunks
        return raw + shown * (split.mean("thought") - split.mean("chunk")), text - shown * split.mean("chunk")
    return raw + shown * (1 - config.raw_chunks) * (split.length - raw), text


def _batch(config: Train) -> float:
    """Tokens of a step."""
    return config.rows * config.sequence_length * FILL


@dataclass
class _Planner:
    recipe: Recipe
    found: Survey
    shape: Shape

    def run(self) -> Iterator[Work]:
        recipe, splits = self.recipe, self.found.splits
        raw = sum(s.documents * s.raw_length for s in splits.values())
        yield Work("prepare", bytes=raw * self.found.bytes_per_token)
        if recipe.synthesize.method != "oracle":
            yield self._synthesize("iter_00/synthesize", recipe.synthesize)
        warm = self._train("iter_00/train", recipe.warm_start_train, [(splits["warm_start"], True, 1.0)])
        yield from (warm, self._evaluate("iter_00/evaluate"))
        trained = [warm]
        loops = [recipe, *(recipe.variant(name) for name in recipe.em.variants)]
        if "raw" not in recipe.em.baselines and any(r.sample.raw_model == OWN_RAW_MODEL for r in loops):
            yield self._train("baselines/raw/train", recipe.raw_train, self._both)
        for work in self._iterations(recipe.sample, "iter_"):
            trained.append(work)
            yield work
        for name in recipe.em.baselines:
            yield from self._baseline(name, trained)
        yield from self._more_samples()
        for name in recipe.em.variants:
            changed = replace(self, recipe=recipe.variant(name))
            yield from changed._iterations(changed.recipe.sample, f"variants/{name}/iter_")

    @property
    def _paper(self) -> Sample:
        """The E-step of `em_paper`."""
        return with_preset(Run(self.recipe, Path()), "paper")

    def _more_samples(self) -> Iterator[Work]:
        """Every K of `em.samples`, with the recipe's own E-step and the paper's, but for what the run does already."""
        own, paper = self.recipe.sample, self._paper
        done = [own, *([paper] if "em_paper" in self.recipe.em.baselines else [])]
        for k in self.recipe.em.samples:
            for name, config in (("em", own), ("em_paper", paper)):
                drawn = config.model_copy(update={"k": k, "last_k": None})
                if drawn not in done:
                    done.append(drawn)
                    yield from self._iterations(drawn, f"samples/{name}_{k}/iter_")

    def _synthesize(self, stage: str, config: Synthesize) -> Work:
        """A teacher's replies: thoughts as long as the survey's, paraphrases in proportion to the text. Those that come
        with the data are only stored."""
        split = self.found.splits["warm_start"]
        asked = prompts.load(config.method, config.prompts)
        sizes = [sum(len(m.content) for m in p.messages) / CHARACTERS_A_TOKEN for p in asked]
        prompt, pieces = sum(sizes) / len(sizes), len(split.pieces) / max(1, split.read)
        if config.method == "latent_thoughts":
            sent, replied = pieces * prompt + (1 + config.context_chunks) * split.mean("chunk"), split.mean("thought")
        else:
            sent, replied = prompt + split.raw_length, split.raw_length * REPLY_SHARE[config.method]
        sent, replied = sent * split.documents, replied * split.documents
        stored = replied * self.found.bytes_per_token
        if config.teacher.kind == "data":
            return Work(stage, bytes=stored)
        money = price(config.prices, int(sent), int(replied))
        return Work(stage, asked_tokens=sent, replied_tokens=replied, money=money, bytes=stored)

    def _iterations(self, sample: Sample, name: str) -> Iterator[Work]:
        recipe, splits, mix = self.recipe, self.found.splits, self.recipe.em.mix
        parts = recipe.em.iterations if recipe.em.regime == "continual" else 1
        corpus = replace(splits["corpus"], documents=splits["corpus"].documents / parts)
        sources = [(splits["warm_start"], True, mix.warm_start), (corpus, True, mix.thoughts)]
        sources += [(corpus, False, mix.raw)] if mix.raw else []
        for n in range(1, recipe.em.iterations + 1):
            drawn = sample.model_copy(update={"k": sample.k_at(n, recipe.em.iterations)})
            yield self._sample(f"{name}{n:02}/sample", drawn, corpus)
            yield self._train(f"{name}{n:02}/train", recipe.train, sources)
            yield self._evaluate(f"{name}{n:02}/evaluate")

    def _sample(self, stage: str, config: Sample, split: Split) -> Work:
        """E-step: contexts and prompts once a chunk, then K draws, each scored with the text behind it.

        An upper bound: draws of a chunk that are equal are scored once, and this takes them all for different.
        """
        context, chunk, thought = (split.mean(name) for name in ("context", "chunk", "thought"))
        pieces = len(split.pieces) / max(1, split.read)
        k, prior = config.k, (1 - config.posterior_share)
        past = (context + chunk) / max(pieces, 1e-9) + CONTROLS  # keys before a draw
        length = thought / max(pieces, 1e-9)
        encode = context + chunk + (CONTROLS + 2) * pieces
        score = k * (thought + chunk + 2 * pieces) + k * prior * (thought + pieces)
        decode = k * (thought + pieces)
        shape, documents = self.shape, split.documents
        scored = shape.forward(score, past + length / 2, True)
        return Work(
            stage,
            encode_tokens=documents * (encode + score),
            decode_tokens=documents * decode,
            encode_flops=documents * (shape.forward(encode, past / 2, False) + scored),
            decode_flops=documents * shape.forward(decode, past + length / 2, True),
            bytes=documents * (decode + thought + split.raw_length) * self.found.bytes_per_token,
        )

    def _evaluate(self, stage: str, thinks: bool = True) -> Work:
        """The likelihood in raw text, in the thoughtless form and behind the empty thought; bounds with the largest K,
        and an answer a document where the recipe asks for answers. A model of raw text has the first likelihood alone,
        and answers without a thought."""
        config, split = self.recipe.evaluate, self.found.splits["held_out"]
        split = replace(split, documents=min(config.documents, split.documents))
        sample = self.recipe.sample.model_copy(
            update={"k": max(config.bound), "posterior_share": config.bound_posterior_share}
        )
        work = self._score(stage, split, 3 if thinks else 1)
        if thinks:
            bounds = self._sample(stage, sample, split)
            encoded, flops = bounds.encode_tokens + work.encode_tokens, bounds.encode_flops + work.encode_flops
            work = replace(bounds, encode_tokens=encoded, encode_flops=flops)
        pieces = len(split.pieces) / max(1, split.read)
        thought = split.mean("thought") / max(pieces, 1e-9) + 2 if thinks else 0
        answers = split.documents * (thought + split.mean("chunk"))
        answers *= config.answer is not None
        flops = self.shape.forward(answers, split.raw_length, True)
        return replace(
            work, decode_tokens=work.decode_tokens + answers, decode_flops=work.decode_flops + flops, bytes=0.0
        )

    def _score(self, stage: str, split: Split, forms: int) -> Work:
        """The likelihood of every chunk behind its context, in so many forms."""
        context, chunk, documents = split.mean("context"), split.mean("chunk"), forms * split.documents
        keys = (context + chunk) / max(len(split.pieces) / max(1, split.read), 1e-9) / 2
        flops = self.shape.forward(context, keys, False) + self.shape.forward(chunk, keys, True)
        return Work(stage, encode_tokens=documents * (context + chunk), encode_flops=documents * flops)

    def _train(self, stage: str, config: Train, sources: list[tuple[Split, bool, float]]) -> Work:
        """`sources`: (documents, with their thoughts or raw, visits of a document an epoch)."""
        visits = sum(split.documents * weight for split, _, weight in sources)
        sizes = [_visit(config, split, thoughts) for split, thoughts, _ in sources]
        tokens, raw = (
            sum(split.documents * weight * size for (split, _, weight), size in zip(sources, part, strict=True))
            for part in zip(*sizes, strict=True)
        )
        unit, amount = config.budget
        trained = {
            "steps": amount * _batch(config),
            "tokens": amount,
            "raw_tokens": amount * tokens / max(raw, 1),
            "epochs": amount * tokens,
        }[unit]
        keys = tokens / max(visits, 1) / 2
        bytes = self.shape.parameters * {"float32": 4, "bfloat16": 2}[self.recipe.model.dtype]
        of_text = trained * raw / max(tokens, 1)
        return Work(stage, trained, of_text, train_flops=3 * self.shape.forward(trained, keys, True), bytes=bytes)

    @property
    def _both(self) -> list[tuple[Split, bool, float]]:
        """The warm start's documents and the corpus."""
        return [(self.found.splits[name], True, 1.0) for name in ("warm_start", "corpus")]

    def _baseline(self, name: str, trained: list[Work]) -> Iterator[Work]:
        """`trained`: the stages of the whole EM run, warm start first."""
        recipe, both, folder = self.recipe, self._both, f"baselines/{name}"
        if name == "em_paper":
            yield from self._iterations(self._paper, f"{folder}/iter_")
            return
        if name in PARAPHRASES:
            config = parse(Synthesize, recipe.synthesize.model_dump() | {"method": name, "prompts": []}, "synthesize")
            yield self._synthesize(f"{folder}/synthesize", config)
        raw, warm_start, total = recipe.raw_train, recipe.warm_start_train, sum(w.train_tokens for w in trained)
        first = trained[0].train_tokens
        steps = first / _batch(warm_start) + (total - first) / _batch(recipe.train)
        configs = {
            "warm_start_matched": (warm_start.with_budget("steps", round(steps)), both[:1]),
            "oracle": (recipe.train, both),
            "raw": (raw, both),
            "raw_tokens": (raw.with_budget("raw_tokens", sum(w.raw_tokens for w in trained)), both),
            "raw_flops": (raw.with_budget("tokens", total), both),
        }
        like_warm_start = (raw.with_budget("tokens", first), both)
        yield self._train(f"{folder}/train", *configs.get(name, like_warm_start))
        yield self._evaluate(f"{folder}/evaluate", name in ("warm_start_matched", "oracle"))
