"""The outer loop: its iterations, what an M-step sees, and what EM is compared with."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from latent_thoughts.config.base import Distinct, Positive, Section, Weight


class Mix(Section):
    """What an M-step trains on: how often a document of each source is visited, in the mean, an epoch."""

    warm_start: Weight = 1.0  # the warm start's documents with their thoughts
    thoughts: Weight = 1.0  # the corpus with the E-step's thoughts
    raw: Weight = 0.0  # the corpus without thoughts

    @model_validator(mode="after")
    def _something(self) -> Mix:
        if not self.warm_start + self.thoughts + self.raw:
            raise ValueError("an M-step needs documents: give warm_start, thoughts or raw a weight above 0")
        return self


Baseline = Literal[
    "raw", "raw_tokens", "raw_flops", "raw_repeat", "raw_fresh", "wrap_baseline", "wrap_cot", "warm_start_matched",
    "em_paper", "oracle",
]  # fmt: skip


class EM(Section):
    """The outer loop (method, section 6)."""

    iterations: Annotated[int, Field(ge=0)] = 4
    regime: Literal["fixed", "continual"] = "fixed"
    mix: Mix = Mix()
    warm_start: dict[str, Any] = {}  # overrides of `train` for the warm start
    raw: dict[str, Any] = {}  # overrides of `train` for the raw baselines
    baselines: Annotated[list[Baseline], Distinct] = ["raw_tokens"]
    samples: Annotated[list[Positive], Distinct] = []  # K of further EM runs, by `sample` and by the paper's preset
    variants: dict[str, dict[str, Any]] = {}  # further EM runs with other settings: {NAME: {sample: {keep: 4}}}
