"""What several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from latent_thoughts import places

if TYPE_CHECKING:
    Anywhere = Path
else:

    class Anywhere:
        """A path or a URL, which `places.place` makes of it: one is a Path, the other has a Path's methods."""

        def __init__(self, path: str):
            raise AssertionError("cyclopts takes the converter instead")

    Anywhere.__name__ = "Path"  # what --help calls it


Place = Annotated[
    Anywhere, Parameter(converter=lambda _, tokens: places.place(tokens[0].value), accepts_keys=False, n_tokens=1)
]
Out = Annotated[
    Place, Parameter(name=["--out", "-o"], help="The run folder, here or in a store (s3://, gs://, hf://).")
]
RecipePath = Annotated[Place, Parameter(help="A YAML recipe (see recipes/).")]
Overrides = Annotated[list[str] | None, Parameter(help="Settings that replace the recipe's: train.lr=3e-4 ...")]
Limit = Annotated[int | None, Parameter(help="Read at most so many documents (data.limit).")]
AtOnce = Annotated[
    int | None,
    Parameter(
        name="--at-once",
        help="Seeds side by side; default: as many as there are GPUs, or else cores. Small models may share a GPU.",
    ),
]
Yes = Annotated[bool, Parameter(name=["--yes", "-y"], help="Ask the teacher without a question before.")]
Iteration = Annotated[int, Parameter(name="--iteration", help="EM iteration; 0 is the warm start.")]
