"""Settings of the teachers, and of the check for evaluation sets in what is trained on."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from latent_thoughts.config.base import Positive, Section, nested

Policy = Literal["retry", "raw", "drop", "accept"]
Count = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(gt=0)]


_SET = {  # what of a request is set elsewhere, or counted on
    "model": "set synthesize.teacher.model",
    "messages": "they come from synthesize.prompts",
    "n": "a question has one reply",
    "best_of": "a question has one reply",
    "stream": "a reply is read as a whole",
    "stream_options": "a reply is read as a whole",
}
_LIMIT = re.compile(r"max_(\w+_)?tokens|max_length")
_KEY = re.compile(
    r"api_?key|secret|passw|credential|authori[sz]ation|bearer|(access|auth)_?token|^(key|token|auth)$", re.I
)


def _is_a_name(text: str) -> str:
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", text):  # without the text: it may be a key that was put in its place
        raise ValueError("name the environment variable that holds the key, in capitals, such as OPENAI_API_KEY")
    return text


def _free(parameters: dict[str, Any]) -> dict[str, Any]:
    """Refuses what is set elsewhere, limits of the reply, and what holds keys: recipes are stored and shown."""
    for name in parameters:
        if name in _SET or _LIMIT.fullmatch(name):
            raise ValueError(f"{name} is not to be set here: {_SET.get(name, 'set synthesize.max_tokens')}")
    for name, _ in nested(parameters):
        if _KEY.search(last := name.rpartition(".")[2]):
            raise ValueError(f"{last} looks like a key: give it by the environment (synthesize.teacher.key_env)")
    return parameters


Variable = Annotated[str, AfterValidator(_is_a_name)]


class Teacher(Section):
    """Who is asked: an endpoint that speaks OpenAI's chat completions, its Batch API, or a model in this process.

    `data`: nobody; the paraphrases come with the data, as the castle's do.
    """

    kind: Literal["openai", "openai_batch", "transformers", "vllm", "llama_cpp", "data"] = "openai"
    model: str | None = None  # the endpoint's name for it; locally a hub name, folder or GGUF file (`package:` too)
    base_url: str | None = None  # such as http://127.0.0.1:8000/v1; default: OPENAI_BASE_URL, else OpenAI's own
    key_env: Variable = "OPENAI_API_KEY"  # name of the environment variable that holds the key
    concurrency: Positive = 32  # requests under way, or sequences decoded, at a time
    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None  # of prompts and of the replies they may bring
    timeout: Amount = 120.0  # seconds an endpoint may stay silent
    retries: Count = 6  # of one request, with pauses that grow, or that the endpoint asks for
    parameters: Annotated[dict[str, Any], AfterValidator(_free)] = {}  # more fields of the request: top_p, ...
    limit_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"  # what the endpoint calls it
    batch_requests: Positive = 50_000  # in one batch of the Batch API
    poll: Amount = 30.0  # seconds between two looks at a batch
    window: Positive = 4096  # tokens a local model takes, prompt and reply together
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of a local model
    memory: Annotated[float, Field(gt=0, le=1)] = 0.9  # share of the device's memory that vllm may take
    compile: bool = True  # by vllm, before the first question: a minute or two on a CPU, worth it for long runs

    @property
    def there(self) -> bool:
        return self.kind == "data" or self.model is not None


class Prices(Section):
    """Price of a million tokens, in any one currency."""

    input: Annotated[float, Field(ge=0)] = 0.0
    output: Annotated[float, Field(ge=0)] = 0.0


class Checks(Section):
    """What becomes of a reply that fails a check.

    `retry` asks again, `raw` leaves the text without a thought (a paraphrase: as it was), `drop` leaves the document
    out, `accept` takes the reply nevertheless (without a text behind its reasoning it is `empty`, which nothing
    accepts). Every failed check is counted, whatever becomes of it.
    """

    unencodable: Literal["retry", "raw", "drop"] = "retry"  # no text that the model's tokenizer takes
    refusal: Policy = "retry"  # the teacher declines, or a filter did
    empty: Literal["retry", "raw", "drop"] = "retry"
    cut: Policy = "retry"  # by max_tokens, or in the middle of reasoning
    loop: Policy = "retry"  # the same words over and over
    copied: Policy = "retry"  # the text handed back
    control: Policy = "retry"  # control tokens spelled out


class Synthesize(Section):
    """Thoughts for the warm start, or paraphrases of its documents.

    `oracle`: the thoughts that come with the data. `latent_thoughts`: a teacher's, one a chunk. `wrap_baseline` and
    `wrap_cot`: a teacher's paraphrases of whole documents.
    """

    method: Literal["oracle", "latent_thoughts", "wrap_baseline", "wrap_cot"] = "oracle"
    prompts: list[str] = []  # prompt files instead of the method's own; of several every document draws one
    context_chunks: Count = 1  # chunks before the one that is asked about, which the teacher is shown
    temperature: Annotated[float, Field(ge=0)] = 0.7
    max_tokens: Positive = 1024  # of a reply
    teacher: Teacher = Teacher()
    prices: Prices = Prices()
    # What all runs of this stage may cost together, whatever their settings. All tokens that were ever paid for are
    # counted at the prices of now, whatever they cost then: new prices, or another teacher's, change what was spent.
    cap: Amount | None = None
    checks: Checks = Checks()
    attempts: Positive = 3  # questions about one chunk in all, where a check's policy is retry
    exhausted: Literal["raw", "drop"] = "raw"  # after the last attempt
    failed: Literal["error", "raw", "drop"] = "error"  # a request that brought no reply
    store: str | None = None  # SQLite file of the replies; default: replies.sqlite in the run folder
    store_mb: Count = 1024  # of replies that this recipe does not use; beyond it the oldest go

    @model_validator(mode="after")
    def _makes_sense(self) -> Synthesize:
        if self.method == "latent_thoughts" and self.teacher.kind == "data":
            raise ValueError("thoughts that come with the data are method oracle")
        if self.method != "oracle" and not self.teacher.there:
            raise ValueError(f"method {self.method} needs a teacher: set synthesize.teacher.model")
        if self.cap is not None and not (self.prices.input or self.prices.output):
            raise ValueError("a cap needs prices to count with: set synthesize.prices.input and output")
        return self


class Contamination(Section):
    """Evaluation sets that neither corpus nor thoughts may repeat, by n-grams of words."""

    sets: dict[str, str] = {}  # name: path, glob, hub:NAME or disk:FOLDER; a row's text is all text of its columns
    split: str = "test"  # of a Hugging Face dataset
    n: Positive = 13  # words in a row that tell a repetition
    remove: bool = False  # leave such documents, and such thoughts, out

    @model_validator(mode="after")
    def _are_sets(self) -> Contamination:
        for name, source in self.sets.items():
            if source.startswith("world:"):
                raise ValueError(
                    f"sets.{name}: a built-in world holds out problems of its own, and is no evaluation set"
                )
        return self
