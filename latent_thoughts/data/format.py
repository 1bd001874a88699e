"""Token layouts and their spans. The only place that knows where control tokens go (method, section 3).

Notation: c context, x chunk, z thought; S, E, P, Q the control tokens.

    prior      S P z E x
    posterior  S E x S Q z E
    thoughtless  S E x
    raw        x
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from latent_thoughts.data.tokenizer import Controls
from latent_thoughts.types import ThoughtDocument, UserError

Ids = tuple[int, ...]
IGNORE = -100


class Part(IntEnum):
    CONTROL = 0  # S, P, Q, the empty S E, BOS: conditioning
    THOUGHT = 1  # z and its E
    TARGET = 2  # text of a chunk that thoughts are meant for
    CONTEXT = 3  # text of other chunks
    EOS = 4


class Form(IntEnum):
    RAW = 0
    PRIOR = 1
    POSTERIOR = 2
    THOUGHTS = 3  # the thought alone (paraphrases)


def context(controls: Controls, before: Sequence[Sequence[int]], chunks: int) -> Ids:
    """Raw text of the last `chunks` chunks before x, behind BOS where that reaches the document's start."""
    window = before[-chunks:]
    ids = [i for chunk in window for i in chunk]
    return (controls.bos, *ids) if len(window) == len(before) else tuple(ids)


def room_for_context(chunk: Sequence[int], max_thought: int, max_tokens: int) -> int:
    """Positions left for c in the longer form, S E x S Q z E."""
    return max_tokens - max_thought - len(chunk) - 5


def fit_context(ids: Ids, chunk: Sequence[int], max_thought: int, max_tokens: int) -> Ids:
    """Truncates c from the left, once for all forms. Raises UserError where x does not fit at all."""
    room = room_for_context(chunk, max_thought, max_tokens)
    if room < 1:
        raise UserError(
            f"a chunk of {len(chunk)} tokens and a thought of {max_thought} do not fit in {max_tokens}: "
            "lower chunking.max_tokens or sample.max_thought_tokens, or raise sample.max_tokens"
        )
    return ids[-room:]


def posterior_prompt(controls: Controls, c: Ids, x: Ids) -> Ids:
    """c S E x S Q: what z ~ q(z | c, x) continues; with z E behind it, the posterior form."""
    return (*c, controls.start, controls.end, *x, controls.start, controls.posterior)


def chunk_in_posterior_prompt(x: Ids) -> tuple[int, int]:
    """Where x stands in `posterior_prompt` without context: behind S E, in the thoughtless form."""
    return 2, 2 + len(x)


def prior_prompt(controls: Controls, c: Ids) -> Ids:
    """c S P: what z ~ p(z | c) continues; with z E x behind it, the prior form."""
    return (*c, controls.start, controls.prior)


def thoughtless_prompt(controls: Controls, c: Ids) -> Ids:
    """c S E: what x continues where nothing was thought."""
    return (*c, controls.start, controls.end)


def raw_prompt(controls: Controls, c: Ids) -> Ids:
    """c: what x continues in raw text; BOS where the context was cut away."""
    return c or (controls.bos,)


@dataclass(slots=True)
class Layout:
    """Token ids and their parts, while a training sequence is laid out."""

    ids: list[int]
    parts: list[Part]

    def add(self, part: Part, *ids: int) -> None:
        self.ids.extend(ids)
        self.parts.extend([part] * len(ids))


def lay_out(document: ThoughtDocument, forms: Sequence[Form], controls: Controls, visit: int = 0) -> Layout:
    """A document as one training sequence: BOS, each chunk in its form, EOS.

    Of a chunk's thoughts every visit takes the next. A chunk without any is raw whatever its form.
    With Form.THOUGHTS the text is left out.
    """
    layout = Layout([], [])
    layout.add(Part.CONTROL, controls.bos)
    for chunk, kept, target, form in zip(document.chunks, document.thoughts, document.target, forms, strict=True):
        thought = kept[visit % len(kept)] if kept else None
        text = Part.TARGET if target else Part.CONTEXT
        if thought is None or form is Form.RAW:
            layout.add(text, *chunk.ids)
        elif form is Form.PRIOR:
            layout.add(Part.CONTROL, controls.start, controls.prior)
            layout.add(Part.THOUGHT, *thought, controls.end)
            layout.add(text, *chunk.ids)
        elif form is Form.POSTERIOR:
            layout.add(Part.CONTROL, controls.start, controls.end)
            layout.add(text, *chunk.ids)
            layout.add(Part.CONTROL, controls.start, controls.posterior)
            layout.add(Part.THOUGHT, *thought, controls.end)
        else:
            layout.add(Part.THOUGHT, *thought)
    layout.add(Part.EOS, controls.eos)
    return layout


def extent(text: Sequence[int], thoughts: Sequence[int | None], forms: Sequence[Form]) -> int:
    """Tokens that `lay_out` makes of chunks of these lengths, with a thought of this length or none each."""
    more = {Form.PRIOR: 3, Form.POSTERIOR: 5}
    total = 2  # BOS and EOS
    for x, z, form in zip(text, thoughts, forms, strict=True):
        if z is None or form is Form.RAW:
            total += x
        else:
            total += z if form is Form.THOUGHTS else x + z + more[form]
    return total


def draw_forms(
    count: int, layout: str, posterior_share: float, raw_share: float, raw_chunks: float, rng: np.random.Generator
) -> list[Form]:
    """One form for each of `count` chunks, drawn afresh at every visit; a whole visit is raw with probability
    `raw_share`, and else a chunk of it with probability `raw_chunks`."""
    fixed = {"prior": Form.PRIOR, "posterior": Form.POSTERIOR, "raw": Form.RAW, "thoughts": Form.THOUGHTS}
    if rng.random() < raw_share:
        return [Form.RAW] * count
    if layout in fixed:
        forms = [fixed[layout]] * count
    else:
        forms = [Form.POSTERIOR if u < posterior_share else Form.PRIOR for u in rng.random(count)]
    if raw_chunks and layout != "thoughts":  # that has no text to leave
        forms = [Form.RAW if u < raw_chunks else form for form, u in zip(forms, rng.random(count), strict=True)]
    return forms


CARRIES_LOSS = {"all": np.ones(len(Part), bool), "targets": np.isin([*Part], (Part.THOUGHT, Part.TARGET, Part.EOS))}


def labels(ids: np.ndarray, parts: np.ndarray, starts: Sequence[int], loss_on: str) -> np.ndarray:
    """Labels of laid-out tokens: `all`, or thoughts with their E, target text and EOS (`targets`).

    Those at `starts` have none: no token of their sequence precedes them.
    """
    found = np.where(CARRIES_LOSS[loss_on][parts], ids, IGNORE)
    found[starts] = IGNORE
    return found
