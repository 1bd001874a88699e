"""The library: what the stages do, for programs.

    from latent_thoughts import RunFolder, Thinker, load_corpus, load_recipe, weigh

`RunFolder` runs stages as the commands do, in the same files, so that one can go on where the other stopped.
`Thinker` holds one trained model in memory, and infers thoughts without writing anything. What is named here stays as
it is within a minor version; all else in the package may change.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from latent_thoughts import ask, em, examine, weights
from latent_thoughts import model as models
from latent_thoughts.config import Chunking, Data, Model, Recipe, Sample
from latent_thoughts.config import load_recipe as _load_recipe
from latent_thoughts.config.base import parse
from latent_thoughts.data import readers, records
from latent_thoughts.data.chunking import chunked
from latent_thoughts.data.tokenizer import Codec
from latent_thoughts.engines.joint import Seeds, infer, tasks
from latent_thoughts.engines.torch_engine import TorchEngine
from latent_thoughts.places import place
from latent_thoughts.provenance import record_recipe
from latent_thoughts.seeds import recipe_path
from latent_thoughts.stages import prepare as preparing
from latent_thoughts.store import run_lock
from latent_thoughts.types import (
    Document,
    Interrupted,
    Manifest,
    Posterior,
    ScoredDraw,
    ThoughtDocument,
    UserError,
)

__all__ = [
    "Chunking",
    "Document",
    "Interrupted",
    "Manifest",
    "Posterior",
    "Recipe",
    "RunFolder",
    "Sample",
    "ScoredDraw",
    "Thinker",
    "ThoughtDocument",
    "UserError",
    "Weights",
    "load_corpus",
    "load_recipe",
    "recipe_path",
    "weigh",
]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from a YAML file, with `section.key=value` overrides. `recipe_path` names those of the package.

    Raises UserError for a missing file, an unknown key or a bad value.
    """
    return _load_recipe(place(path), list(overrides))


def load_corpus(source: str, *, seed: int = 0, **settings: Any) -> Iterator[Document]:
    """Streams the documents of a source: files, `hub:NAME`, `disk:FOLDER` or `world:NAME`.

    `settings` are those of a recipe's `data` section (text, pieces, thought, limit, malformed, ...); `seed` is a
    built-in world's. Raises UserError for a source that is missing, and for a malformed row.
    """
    return readers.read(parse(Data, {"source": source, **settings}, "data"), seed)


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """Importance weights of K draws of one chunk. `log_weights` and `shares` (which sum to 1) have shape (K,), nats.

    `effective_sample_size` = (Σ w)² / Σ w²; `bound` = L_K = log((1/K) Σ w), in nats.
    """

    log_weights: NDArray[np.float64]
    shares: NDArray[np.float64]
    effective_sample_size: float
    bound: float


def weigh(log_p: ArrayLike, log_q: ArrayLike, finished: ArrayLike | None = None) -> Weights:
    """Weighs draws by log p(z, x | c) and log q(z), each of shape (K,), in nats. An unfinished draw has no weight, but
    counts in K. Raises UserError where shapes differ, or a finished draw has no finite score."""
    log_p, log_q = np.asarray(log_p, np.float64), np.asarray(log_q, np.float64)
    ended = np.ones(log_p.shape, bool) if finished is None else np.asarray(finished, bool)
    if log_p.ndim != 1 or not log_p.size or not log_p.shape == log_q.shape == ended.shape:
        shapes = f"{log_p.shape}, {log_q.shape} and {ended.shape}"
        raise UserError(f"log_p, log_q and finished have one entry a draw each, not shapes {shapes}")
    try:
        found = weights.log_weights(log_p, log_q, ended)
    except UserError as error:
        raise UserError(f"{error}: give it one, or mark the draw as unfinished") from None
    return Weights(found, weights.normalised(found), weights.effective_sample_size(found), weights.bound(found))


class Thinker:
    """A trained model in memory.

    `model` is a train stage of a run (`RUN/iter_01/train`) or a model folder, here or behind a URL. Raises UserError
    for a folder without a model, and for a model that was not trained on thoughts.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        seed: int = 0,
        device: str = "auto",
        dtype: Literal["float32", "bfloat16"] = "float32",
    ):
        folder = ask.model_folder(place(model))
        tokenizer, self._controls = models.load_tokenizer(folder)
        self._codec = Codec(tokenizer)
        self._engine = TorchEngine(models.load(folder, parse(Model, {"device": device, "dtype": dtype}, "model")))
        self._seed = seed

    def infer(
        self,
        documents: Iterable[Document],
        settings: Sample | None = None,
        chunking: Chunking | None = None,
        *,
        temperature: float = 1.0,
    ) -> list[Posterior]:
        """The E-step, one posterior for every chunk that a thought is meant for, in order.

        A posterior has K draws with their scores and weights, and says which were kept. Draws depend on the seed,
        the document's id and the chunk alone. Of `settings` what belongs to a run's iterations (`temperature`,
        `last_k`) is not read. Raises UserError for a chunk that does not fit, a temperature that is not above 0, and
        settings with a raw model.
        """
        if settings and settings.raw_model:
            raise UserError("sample.raw_model is for runs: a Thinker's gains are over the empty thought")
        step, controls = settings or Sample(), self._controls
        models.check_positions(self._engine.passes.model, step.max_tokens, "max_tokens")
        cut = [chunked(document, chunking or Chunking(), self._codec) for document in documents]
        todo = [task for d in cut for task in tasks(d.chunks, d.target, controls, step)]
        return infer(self._engine, todo, controls, step, Seeds(self._seed, 0), temperature)

    def text(self, ids: Sequence[int]) -> str:
        """The text of a thought's or a chunk's token ids."""
        return self._codec.decode(ids)

    def answer(
        self, question: str, *, temperature: float = 0.0, max_thought_tokens: int = 256, max_answer_tokens: int = 128
    ) -> tuple[str, str]:
        """(thought, answer): thinks behind the question, then goes on. Temperature 0 is greedy."""
        limits = (max_thought_tokens, max_answer_tokens)
        return ask.answer(self._engine, self._codec, self._controls, question, self._seed, temperature, *limits)


_generator_kept: Any = functools.partial(torch.random.fork_rng, devices=[])  # pyright: ignore
_ONE_AT_A_TIME = threading.Lock()  # stages seed torch's generator, which threads share


class RunFolder:
    """A recipe and its run folder, here or in a store: the stages of `latent-thoughts`, one method each.

    Every method takes the folder's lock while it works, does nothing that is done already, and raises UserError for a
    mistake (also where a stage before it is not complete). Iteration 0 is the warm start. A teacher is asked without
    a question before it; `synthesize.cap` limits what it may cost.
    """

    def __init__(self, recipe: Recipe, folder: str | Path):
        self.recipe, self.folder = recipe, place(folder)
        self._run = em.Run(recipe, self.folder)
        self._loop = em.Loop(self._run, "em", recipe.sample, self.folder)

    def prepare(self) -> Manifest:
        """Reads, splits, chunks and tokenises the corpus, and sets up the base model."""
        with self._held(self._run.prepared):
            return self._run.prepare()

    def synthesize(self) -> Manifest:
        """The warm start's thoughts: those that come with the data, or a teacher's."""
        with self._held(self._run.synthesized(self.recipe.synthesize.method)):
            return self._run.synthesize()

    def sample(self, iteration: int = 1) -> Manifest:
        """E-step: thoughts for the corpus, by the model of the iteration before. `counts` are its health."""
        with self._held(self._loop.e_step(iteration)):
            return self._loop.sample(iteration)

    def train(self, iteration: int = 0) -> Manifest:
        """M-step: a model trained on the documents with their thoughts."""
        with self._held(self._loop.iteration(iteration) / "train"):
            return self._run.train_warm_start() if iteration == 0 else self._loop.train(iteration)

    def evaluate(self, iteration: int = 0) -> dict[str, Any]:
        """Held-out likelihood, bound and answers of an iteration's model, and the recipe's tasks: a row of
        results.json."""
        with self._held(self._loop.iteration(iteration) / "evaluate"):
            row = self._loop.evaluate(iteration)[0]
            examine.record(self.recipe, self.folder, row)
            return row

    def em(self) -> list[dict[str, Any]]:
        """All stages in turn; the rows of results.json."""
        with self._held(None):
            return em.em(self.recipe, self.folder)

    def model(self, iteration: int = 0) -> Path:
        """The train stage of an iteration, whose folder `model` is a plain Hugging Face model."""
        return self._loop.iteration(iteration) / "train"

    def documents(
        self, split: Literal["warm_start", "corpus", "held_out"] = "corpus", iteration: int | None = None
    ) -> Iterator[ThoughtDocument]:
        """The documents of a split: with the thoughts of an iteration, or as they were prepared. Iteration 0 has those
        of the warm start, the others the corpus. Raises UserError where there are none."""
        stage = "synthesize" if iteration == 0 else "sample"
        folder = self._run.prepared if iteration is None else self._loop.iteration(iteration) / stage
        empty = True
        for _, part in records.shards(folder, split):
            empty = False
            yield from part
        if empty and (iteration is not None or split not in preparing.SPLITS):
            raise UserError(f"{folder} has no documents of split {split}")

    @contextlib.contextmanager
    def _held(self, made: Path | None) -> Generator[None]:
        """The run's lock, with the recipe left in the folder before stage `made` is made (None: all of them)."""
        models.set_up_torch(self.recipe.threads)
        with _ONE_AT_A_TIME, _generator_kept(), run_lock(self.folder):
            if made is not None and (told := record_recipe(self.recipe, self.folder, made)):
                warnings.warn(told, stacklevel=4)
            yield
