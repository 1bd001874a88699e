"""Train language models on the thoughts behind the text (BoLT, arXiv 2503.18866).

The library's names stand in `latent_thoughts.api` and are imported when they are first used, so that the command line
and programs that want a part of them need not wait for torch.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from latent_thoughts.api import (
        Chunking,
        Document,
        Interrupted,
        Manifest,
        Posterior,
        Recipe,
        RunFolder,
        Sample,
        ScoredDraw,
        Thinker,
        ThoughtDocument,
        UserError,
        Weights,
        load_corpus,
        load_recipe,
        recipe_path,
        weigh,
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
    "__version__",
    "load_corpus",
    "load_recipe",
    "recipe_path",
    "weigh",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from latent_thoughts import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
