"""The teacher that a recipe names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from latent_thoughts.bases import path_of
from latent_thoughts.config.synthesize import Synthesize
from latent_thoughts.places import below, place, remote, version
from latent_thoughts.store import fingerprint
from latent_thoughts.teachers.base import Notes, Teacher


def model_name(config: Synthesize) -> str:
    """The model's name in every question: an endpoint's as it is, a local one's with a hash of its files."""
    name = config.teacher.model
    assert name is not None
    if config.teacher.kind in ("openai", "openai_batch"):
        return name
    files = below(place(name if remote(place(name)) else path_of(name)))
    return f"{name}@{fingerprint([version(file) for file in files])[:12]}" if files else name


@contextlib.contextmanager
def loaded(config: Synthesize, notes: Notes) -> Iterator[Teacher]:
    """Raises UserError where what it needs is not installed, or a model cannot be loaded."""
    with contextlib.closing(_make(config, notes)) as teacher:
        yield teacher


def _make(config: Synthesize, notes: Notes) -> Teacher:
    match config.teacher.kind:
        case "openai":
            from latent_thoughts.teachers.openai_api import OpenAITeacher

            return OpenAITeacher(config.teacher)
        case "openai_batch":
            from latent_thoughts.teachers.batch_api import BatchTeacher

            return BatchTeacher(config.teacher, notes)
        case "transformers":
            from latent_thoughts.teachers.transformers_local import TransformersTeacher

            return TransformersTeacher(config.teacher, config.max_tokens)
        case "vllm":
            from latent_thoughts.teachers.vllm_local import VllmTeacher

            return VllmTeacher(config.teacher)
        case "llama_cpp":
            from latent_thoughts.teachers.llama_cpp_local import LlamaCppTeacher

            return LlamaCppTeacher(config.teacher)
        case "data":
            raise AssertionError("what comes with the data is not asked for")
