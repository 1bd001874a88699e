"""What a run says of itself: its resolved recipe with versions and seed, a model's card."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from latent_thoughts import __version__
from latent_thoughts.config import UNREAD, Dumper, Model, Recipe, Train, load_recipe
from latent_thoughts.places import relative
from latent_thoughts.store import atomic
from latent_thoughts.types import UserError


def provenance(recipe: Recipe) -> dict[str, Any]:
    """Versions, machine and seed of a run."""
    packages = ("torch", "transformers", "tokenizers", "numpy", "pyarrow")
    return {
        "latent_thoughts": __version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "seed": recipe.seed,
        **{name: importlib.metadata.version(name) for name in packages},
    }


def save_recipe(recipe: Recipe, folder: Path, name: str = "recipe.yaml") -> None:
    """Writes the resolved recipe with versions and seed as comments, so that it can be run again.

    Raises UserError where that would overwrite a recipe that a person wrote.
    """
    import yaml

    path = folder / name
    if path.exists() and not path.read_text(encoding="utf-8").startswith("# latent_thoughts:"):
        raise UserError(f"{path} is not a run's: keep your own recipe outside the run folder, where it is written")
    head = "".join(f"# {name}: {value}\n" for name, value in provenance(recipe).items())
    body = yaml.dump(recipe.model_dump(mode="json"), Dumper=Dumper, sort_keys=False, allow_unicode=True)
    if path.exists() and path.read_text(encoding="utf-8") == head + body:
        return
    with atomic(path) as temporary:
        temporary.write_text(head + body, encoding="utf-8")


# What of the recipe a finished stage was made with, besides what the stages before it were.
MADE_WITH = {
    "prepare": ("seed", "data", "chunking", "model", "contamination"),
    "synthesize": ("synthesize",),
    "train": ("train", "em.mix", "em.regime", "em.warm_start", "em.raw"),
    "sample": ("sample", "em.iterations", "em.regime", "engine.kind", "engine.scorer"),
    "evaluate": (
        *("evaluate", "sample.max_thought_tokens", "sample.context_chunks", "sample.max_tokens"),
        *("engine.kind", "engine.scorer"),
    ),
}
# What no result depends on.
NO_RESULTS = {*(f"train.{name}" for name in UNREAD), "model.device", "model.attention", "model.allow_pickle"}
# What no later stage may have otherwise: it would show settings that its documents and its base were not made with.
PREPARED = ("data", "chunking", "contamination", "model.base", "model.tokenizer", "model.new_tokens")
PREPARED_BY = "settings.yaml"  # beside the documents: the recipe by which they were
STAGES = (
    "prepare",
    "iter_*/*",
    "baselines/*/*",
    *(f"{kind}/*/iter_*/*" for kind in ("baselines", "samples", "variants")),
)


def own_recipe(folder: Path, made: Path) -> Path:
    """Where the recipe of a single stage stands that was made with other settings than the run's."""
    return folder / f"recipe.{relative(made, folder).replace('/', '.')}.yaml"


def record_recipe(recipe: Recipe, folder: Path, made: Path) -> str:
    """Writes the recipe of a command that makes a single stage, `made`.

    RUN/recipe.yaml stays what it is where other stages were finished with settings that are different now; the recipe
    is then written beside it, under the stage's name. Returns the line that tells so; else an empty one. Raises
    UserError where the run's documents or its base model were prepared with other settings, unless `made` are the tasks
    that any model is asked, which use neither.
    """
    own = own_recipe(folder, made)
    finished = {path.parent for pattern in STAGES for path in folder.glob(f"{pattern}/manifest.json")}
    if folder / "prepare" in finished - {made} and made != folder / "tasks":
        _check_prepared(recipe, folder)
    settled = [name for stage in finished - {made} for name in MADE_WITH.get(stage.name, ())]
    differing = [name for name in _differing(folder / "recipe.yaml", recipe) if _among(name, settled)]
    differing = [name for name in differing if name not in NO_RESULTS]
    if not differing:
        save_recipe(recipe, folder)
        own.unlink(missing_ok=True)
        return ""
    save_recipe(recipe, folder, own.name)
    return (
        f"what is finished in {folder} was made with other settings ({', '.join(differing)}): its recipe.yaml stays, "
        f"and this command's is {own.name}; to go on with the run's own, give {folder / 'recipe.yaml'}"
    )


def settle_recipes(folder: Path, went_through: Callable[[Path], bool]) -> None:
    """Once stages have been made with RUN/recipe.yaml all together, none of them has a recipe of its own any more."""
    for made in {path.parent for pattern in STAGES for path in folder.glob(f"{pattern}/manifest.json")}:
        if went_through(made):
            own_recipe(folder, made).unlink(missing_ok=True)


def _check_prepared(recipe: Recipe, folder: Path) -> None:
    """Raises UserError for another recipe than that beside the documents (of an older run: than the run's own)."""
    known = [folder / "prepare" / PREPARED_BY, folder / "recipe.prepare.yaml", folder / "recipe.yaml"]
    own = next((path for path in known if path.exists()), known[-1])
    differing = _differing(own, recipe)
    # some documents may be prepared for a trial; of another version's recipe nothing can be told
    if wrong := [name for name in differing if "." in name and _among(name, PREPARED) and name != "data.limit"]:
        raise UserError(
            f"{folder} was prepared with other settings ({', '.join(wrong)}): run latent-thoughts prepare with this "
            f"recipe first, or give {own}"
        )


def _among(name: str, names: Iterable[str]) -> bool:
    """Whether a setting, or a whole section, is one of those named or a part of one."""
    return any(name == n or name.startswith(f"{n}.") or n.startswith(f"{name}.") for n in names)


def _differing(path: Path, recipe: Recipe) -> list[str]:
    """Settings that a recipe in a file has different, as in `train.lr`: all sections, where it cannot be read."""
    if not path.exists():
        return []
    try:
        known = load_recipe(path).model_dump()
    except UserError:
        known = {}
    found = []
    for section, value in recipe.model_dump().items():
        before = known.get(section)
        if isinstance(value, dict) and isinstance(before, dict):
            found += [f"{section}.{name}" for name in value if before.get(name) != value[name]]
        elif before != value:
            found.append(section)
    return found


_PLACE = re.compile(r"(?:disk:)?(?:[a-zA-Z0-9+]+://|[/~]|\.{1,2}/)|disk:")


def unplaced(name: str, is_place: bool = False) -> str:
    """A name that may leave this machine: of a path or URL the last part, since where things lie is nobody else's
    business. A hub's name and a world's stay as they are. `is_place`: it is one, however it looks."""
    if name.startswith(("hub:", "world:", "package:")) or "\n" in name:
        return name
    if not (is_place or _PLACE.match(name) or _exists(name)):
        return name
    path = name.partition("?")[0] if "://" in name else name
    return path.rstrip("/").rpartition("/")[2]


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except OSError:  # too long for a file's name
        return False


def model_card(train: Train, model: Model, counts: dict[str, Any], seed: int) -> str:
    """A Hugging Face model card: what the model was made from, and how."""
    import yaml

    settings = {"train": train.model_dump(mode="json", exclude_none=True), "seed": seed, "counts": counts}
    recipe = yaml.dump(settings, Dumper=Dumper, sort_keys=False, allow_unicode=True)
    base = (
        unplaced(model.base) if isinstance(model.base, str) else f"{model.base.get('model_type', 'llama')} from scratch"
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [latent-thoughts]
---

Continued pretraining of `{base}` on documents with their thoughts, by latent-thoughts {__version__}
(the method: *Reasoning to Learn from Latent Thoughts*, arXiv 2503.18866).

The model writes a thought between `<|latent_start|><|latent_prior|>` and `<|latent_end|>`, and then the text;
after `<|latent_start|><|latent_posterior|>` it says the thought behind the text before it.

```yaml
{recipe}```
"""
