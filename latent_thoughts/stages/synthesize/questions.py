"""What a teacher is asked about a document, and what its replies come to.

A unit is what gets one reply: a chunk that thoughts are meant for, or a whole document that is paraphrased. All of
this is a function of recipe and document, so that a later run finds every reply by its question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from latent_thoughts.config import Synthesize
from latent_thoughts.data.chunking import content_seed
from latent_thoughts.store import fingerprint
from latent_thoughts.teachers import checks
from latent_thoughts.teachers.base import Answer, Failure, Request
from latent_thoughts.teachers.prompts import Prompt
from latent_thoughts.types import ThoughtDocument

CHARACTERS_A_TOKEN = 4  # of a prompt's own English, in estimates


@dataclass(frozen=True, slots=True)
class Unit:
    """`index` is the chunk's, 0 for a whole document. By the model's tokenizer the fields take `tokens`, and what the
    reply is about `text_tokens`."""

    index: int
    fields: dict[str, str]
    original: str
    tokens: int
    text_tokens: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the replies about a unit come to. `fate`: kept (`text` is the reply), raw, drop, failed, or open.

    `next` is the question to ask where it is open. `faults` are the checks that replies failed.
    """

    fate: str
    text: str = ""
    faults: tuple[str, ...] = ()
    next: Request | None = None
    failure: Failure | None = None


class Questions:
    """`model` names the teacher's model in every payload; `seed` draws the documents' prompts; `takes` tells whether
    a reply can become what it is to become."""

    def __init__(self, config: Synthesize, prompts: list[Prompt], model: str, seed: int, takes: Callable[[str], bool]):
        self.config, self.prompts, self.model, self.seed, self.takes = config, prompts, model, seed, takes
        self.sizes = {p.hash: sum(len(m.content) for m in p.messages) // CHARACTERS_A_TOKEN for p in prompts}

    def prompt(self, document: ThoughtDocument) -> Prompt:
        return self.prompts[content_seed(document.id, self.seed) % len(self.prompts)]

    def units(self, document: ThoughtDocument) -> list[Unit]:
        texts, sizes = [c.text for c in document.chunks], [len(c.ids) for c in document.chunks]
        if self.config.method != "latent_thoughts":
            text = "".join(texts)
            return [Unit(0, {"document": text.strip()}, text, sum(sizes), sum(sizes))]
        units = []
        for n, wanted in enumerate(document.target):
            if wanted and texts[n].strip():  # about nothing there is nothing to ask
                first = max(0, n - self.config.context_chunks)
                fields = {"context": "".join(texts[first:n]).strip(), "chunk": texts[n].strip()}
                units.append(Unit(n, fields, texts[n], sum(sizes[first : n + 1]), sizes[n]))
        return units

    def prompt_tokens(self, document: ThoughtDocument, unit: Unit) -> int:
        """About how many."""
        return self.sizes[self.prompt(document).hash] + unit.tokens

    def requests(self, document: ThoughtDocument, unit: Unit) -> Iterator[Request]:
        """The questions about a unit, an attempt each: the same payload under another key."""
        config, prompt = self.config, self.prompt(document)
        payload: dict[str, Any] = {
            "model": self.model,
            "messages": prompt.fill(unit.fields),
            "temperature": config.temperature,
            config.teacher.limit_name: config.max_tokens,
            **config.teacher.parameters,
        }
        tokens = self.prompt_tokens(document, unit)
        for attempt in range(config.attempts):
            yield Request(fingerprint(payload, attempt), payload, tokens, config.max_tokens)

    def verdict(self, document: ThoughtDocument, unit: Unit, answers: Callable[[str], Answer | None]) -> Verdict:
        """What the answers that are there come to, read in the order of the attempts."""
        faults: tuple[str, ...] = ()
        for request in self.requests(document, unit):
            answer = answers(request.key)
            if answer is None:
                return Verdict("open", faults=faults, next=request)
            if isinstance(answer, Failure):
                return Verdict("failed", faults=faults, failure=answer)
            fault = checks.fault(answer, unit.original, self.takes, self.config.max_tokens)
            if fault is None:
                return Verdict("kept", checks.spoken(answer.text), faults)
            if getattr(self.config.checks, fault) == "accept" and not checks.says_something(answer.text):
                fault = "empty"  # which is never accepted
            faults = (*faults, fault)
            policy = getattr(self.config.checks, fault)
            if policy == "accept":
                return Verdict("kept", checks.spoken(answer.text), faults)
            if policy != "retry":
                return Verdict(policy, faults=faults)
        return Verdict(self.config.exhausted, faults=faults)
