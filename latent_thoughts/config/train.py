"""How the M-step trains."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from latent_thoughts.config.base import Positive, Section, Seed, Share, Weight

Fraction = Annotated[float, Field(ge=0, lt=1)]
BUDGETS = ("steps", "tokens", "raw_tokens", "epochs")
# What the trained weights do not depend on; by skip a training that diverged goes on, and its counts tell of it.
UNREAD = frozenset(
    {"checkpoint_steps", "log_steps", "micro_rows", "workers", "keep", "shard", "tracker", "logits", "spike"}
    | {"checkpoint_activations", "skip"}
)


class Train(Section):
    """The M-step. Exactly one of steps, tokens, raw_tokens and epochs is the budget."""

    steps: Positive | None = None
    tokens: Positive | None = None
    raw_tokens: Positive | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    layout: Literal["mixed", "prior", "posterior", "raw", "thoughts"] = "mixed"
    posterior_share: Share = 0.5  # probability of the posterior form, in the mixed layout
    raw_share: Share = 0.0  # probability that a visit takes the raw layout
    raw_chunks: Share = 0.0  # else, that a chunk does: what follows it sees raw text, as the E-step's contexts are
    loss_on: Literal["all", "targets"] = "all"  # targets: thoughts and the chunks they are meant for
    sequence_length: Annotated[int, Field(ge=2)] = 2048
    rows: Positive = 8  # sequences in a batch
    micro_rows: Positive | None = None  # sequences in a forward pass of a process; default: all that it has
    workers: Annotated[int, Field(ge=0)] = 0  # processes that lay batches out ahead
    logits: Positive | None = None  # held at a time (positions x vocabulary); default: 2**24, on a GPU 2**27
    checkpoint_activations: bool = False  # less memory, a third more work
    compile: Literal["blocks", "whole"] | None = None  # every block by torch.compile; on a CPU all of a small model
    shard: Literal["full", "hybrid"] = "full"  # under torchrun: over all processes, or within each machine
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for hidden matrices, adamw for the rest, experts among it
    lr: Annotated[float, Field(gt=0)] = 1e-4
    muon_lr: Annotated[float, Field(gt=0)] = 0.02
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    weight_decay: Weight = 0.01  # of all parameters, embeddings, norms and biases too
    clip: Weight = 1.0  # norm of the gradient that is not exceeded; 0: none
    skip: list[Seed] = []  # steps whose batch is passed over, such as one that a training diverged at
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"  # cosine falls to 0
    decay_share: Share = 0.2  # of a wsd run; of n decaying steps the last still has 1 / n of the peak
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    dropout: Fraction = 0.0  # besides the model's own, of which GPT-2 and OPT have 0.1; drawn by step and process
    ema: Fraction = 0.0  # decay of averaged weights, from the base's on, which are then exported; 0: none
    spike: Annotated[float, Field(gt=0)] = 4.0  # nats a token that a loss may exceed the last 50; more stops the run
    held_out: Annotated[int, Field(ge=0)] = 0  # documents whose loss is taken at every checkpoint
    checkpoint_steps: Positive = 500
    keep: Positive = 1  # checkpoints, besides the one with the lowest held-out loss
    export: Literal["last", "best"] = "last"  # which of them becomes the model
    log_steps: Positive = 20
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"  # besides metrics.jsonl

    @model_validator(mode="after")
    def _one_budget(self) -> Train:
        given = [n for n in BUDGETS if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of steps, tokens, raw_tokens and epochs, not {' and '.join(given)}")
        if self.export == "best" and not self.held_out:
            raise ValueError("export: best needs held_out documents to tell which is best")
        return self

    @property
    def budget(self) -> tuple[str, float]:
        for name in BUDGETS:
            if (value := getattr(self, name)) is not None:
                return name, float(value)
        return "epochs", 1.0

    def with_budget(self, name: str, amount: float) -> Train:
        cleared = dict.fromkeys(BUDGETS)
        return self.model_copy(update={**cleared, name: amount})
