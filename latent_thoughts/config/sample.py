"""How the E-step infers thoughts, and the presets that name the paper's way and ours."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from latent_thoughts.config.base import Positive, Section, Share

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"k": 4, "last_k": None, "posterior_share": 1.0, "temperature": [1.0, 1.0], "accept": "all",
              "rejected": "raw"},
    "default": {"k": 16, "last_k": None, "posterior_share": 0.5, "temperature": [2.0, 1.0], "accept": "gain",
                "rejected": "skip"},
}  # fmt: skip
OWN_RAW_MODEL = "raw"  # sample.raw_model: a model of the run's own documents as text alone


class Sample(Section):
    """The E-step (method, section 5). A preset gives the values that are not set; one that is named on the command line
    or by a variant sets all of its values anew."""

    preset: Literal["paper", "default"] = "default"
    k: Positive = 16
    last_k: Positive | None = None  # at the last iteration, if another number
    posterior_share: Share = 0.5  # of the proposal; the rest are draws from the prior
    temperature: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (2.0, 1.0)
    accept: Literal["gain", "weight", "all"] = "gain"  # what must exceed log p(x | c): log p(x | c, z), or log w
    margin: float = 0.0  # nats by which a chosen thought must
    choose: Literal["resample", "best", "uniform"] = "resample"
    keep: Positive = 1  # thoughts chosen a chunk, all different; training takes them in turn, one a visit
    rejected: Literal["skip", "raw"] = "skip"  # a document with a chunk of which no thought is kept
    max_thought_tokens: Positive = 1024
    context_chunks: Positive = 3
    max_tokens: Positive = 2048  # context + thought + chunk + control tokens
    raw_model: str | None = None  # gains are over its log p(x | c): a train stage of raw text; raw: made in the run
    max_gap: float = 1.0  # nats a thought; sampler and scorer that disagree by more stop the run

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        name = values.get("preset", "default")
        return {**(PRESETS.get(name, {}) if isinstance(name, str) else {}), **values}

    @model_validator(mode="after")
    def _thoughts_fit(self) -> Sample:
        if self.max_thought_tokens >= self.max_tokens:
            raise ValueError(
                f"max_tokens, which is {self.max_tokens}, is for context, thought and chunk together: raise it, or "
                f"lower max_thought_tokens, which is {self.max_thought_tokens}"
            )
        return self

    def temperature_at(self, iteration: int, iterations: int) -> float:
        """Linear from the first value at iteration 1 to the second at the last one."""
        return _between(*self.temperature, iteration, iterations)

    def k_at(self, iteration: int, iterations: int) -> int:
        """Linear from `k` at iteration 1 to `last_k` at the last one."""
        return round(_between(self.k, self.last_k or self.k, iteration, iterations))


def _between(first: float, last: float, iteration: int, iterations: int) -> float:
    share = (iteration - 1) / max(1, iterations - 1)
    return first + (last - first) * min(1.0, max(0.0, share))
