"""`train.compile: whole`: forward and backward pass of a small model as one library, compiled for a CPU by torch's
AOTInductor.

Torch's compiler takes a hundred megabytes of the process that loads it, so a process of its own traces and compiles.
What it leaves lies in this machine's cache, and runs without Python between its kernels.
"""

from __future__ import annotations

import copy
import hashlib
import json
import multiprocessing
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from latent_thoughts import attention, places
from latent_thoughts.attention import Blocks
from latent_thoughts.data import format
from latent_thoughts.data.packing import positions
from latent_thoughts.progress import track
from latent_thoughts.stages.train.layers import add_dropout
from latent_thoughts.store import atomic
from latent_thoughts.types import PackedRow, UserError

FAILED = "train.compile: whole could not compile this model (take blocks, or leave the setting out)"


class Whole:
    """A model's training pass. A row is padded to a multiple of `multiple` tokens, and each such size has a library.

    `logits` are held at a time at most (positions x vocabulary); `dropout` is what `add_dropout` was given. Raises
    UserError for a model that cannot be compiled so.
    """

    def __init__(self, model: Any, multiple: int, logits: int, dropout: float = 0.0):
        if model.device.type != "cpu":
            raise UserError("train.compile: whole is for CPUs: take blocks")
        if not attention.install(model):
            raise UserError(f"train.compile: whole does not know {model.config.model_type} models: take blocks")
        if buffers := {name for name, _ in model.named_buffers()} & set(model.state_dict()):
            raise UserError(f"train.compile: whole leaves buffers as they begin, such as {min(buffers)}: take blocks")
        self.model, self.multiple, self.logits, self.dropout = model, multiple, logits, dropout
        self.vocabulary = model.get_output_embeddings().weight.shape[0]
        self.libraries: dict[Shape, Any] = {}

    def __call__(self, packed: PackedRow) -> tuple[torch.Tensor, torch.Tensor]:
        """(sum of the losses, differentiable; the loss of what follows each position, 0 where that carries none)."""
        place = positions(packed)
        block = 1 << max(3, int(place.max()).bit_length())  # a power of two, so that there are few libraries
        size = -(-len(place) // self.multiple) * self.multiple
        size = -(-size // block) * block
        if size * self.vocabulary > self.logits:
            raise UserError(
                f"train.compile: whole holds logits of {size} positions at a time, more than train.logits: "
                "take fewer micro_rows, or compile: blocks"
            )
        columns = np.zeros((4, size), np.int64)
        columns[2:, len(place) :] = [[-2], [format.IGNORE]]
        columns[:, : len(place)] = packed.ids, place, packed.document_ids, packed.labels
        ids, place, documents, labels = torch.from_numpy(columns)
        library = self._library(Shape(size, block, torch.is_autocast_enabled("cpu")))
        inputs = [ids, place, Blocks.hidden(documents, block), labels]
        return _Pass.apply(library, inputs, *self.model.parameters())  # pyright: ignore

    def _library(self, shape: Shape) -> Any:
        if shape not in self.libraries:
            path = places.cache() / "compiled" / f"{self._key(shape)}.pt2"
            if not path.exists():
                self._make(shape, path)
            try:
                self.libraries[shape] = self._load(path)
            except RuntimeError as error:  # torch's, in many lines
                path.unlink(missing_ok=True)
                reason = str(error).strip().splitlines()[0]
                raise UserError(f"{path} was damaged and is now removed: start again ({reason})") from None
        return self.libraries[shape]

    def _load(self, path: Path) -> Any:
        """What torch._inductor.aoti_load_package does, which would load the compiler for it."""
        load = torch._C._aoti.AOTIModelPackageLoader  # pyright: ignore[reportAttributeAccessIssue]
        return load(str(path), "model", False, 1, -1)

    def _key(self, shape: Shape) -> str:
        """Of all that a library depends on."""
        import transformers

        sources = [Path(__file__), *sorted(Path(attention.__file__).parent.glob("*.py"))]
        code = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
        config = {name: value for name, value in self.model.config.to_dict().items() if name != "_name_or_path"}
        cpu = torch.backends.cpu.get_cpu_capability()
        versions = [torch.__version__, transformers.__version__, code]
        everything = [asdict(shape), config, self.dropout, cpu, torch.get_num_threads(), versions]
        return hashlib.sha256(json.dumps(everything, sort_keys=True, default=str).encode()).hexdigest()

    def _make(self, shape: Shape, path: Path) -> None:
        kind, config = type(self.model), copy.deepcopy(self.model.config)
        with tempfile.TemporaryDirectory() as folder, track("compile", 1, "library") as advance:
            made = Path(folder) / "pass.pt2"
            settings = (kind, config, self.dropout, torch.get_num_threads(), shape, made)
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                try:
                    pool.submit(_compile, *settings).result()
                except BrokenProcessPool:
                    raise UserError(f"{FAILED}: its process was killed") from None
            with atomic(path) as temporary:
                shutil.copyfile(made, temporary)
            advance(1)


@dataclass(frozen=True, slots=True)
class Shape:
    """Positions of a row, of a block of attention, and whether products are taken in bfloat16."""

    size: int
    block: int
    half: bool


class _Pass(torch.autograd.Function):
    """The library gives losses and gradients at once."""

    @staticmethod
    def forward(ctx: Any, library: Any, inputs: list[torch.Tensor], *parameters: torch.Tensor) -> Any:
        losses, *ctx.grads = library.boxed_run([*(p.detach() for p in parameters), *inputs])
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx: Any, total: torch.Tensor, _: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        grads, ctx.grads = ctx.grads, None
        return None, None, *(g.mul_(total) for g in grads)


def _compile(*settings: Any) -> None:
    """In a process of its own. Raises UserError in one line: not all of torch's own errors can be sent back."""
    try:
        _write_library(*settings)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{FAILED}: {next((line for line in lines if 'error' in line.lower()), lines[0])}") from None


def _write_library(kind: Any, config: Any, dropout: float, threads: int, shape: Shape, path: Path) -> None:
    """For models of this kind, whatever their weights."""
    from torch._inductor import aoti_compile_and_package
    from torch.fx.experimental.proxy_tensor import make_fx

    warnings.filterwarnings("ignore", category=FutureWarning)  # of torch about itself
    torch.set_num_threads(threads)  # which the code is made for
    model = kind._from_config(config, attn_implementation="eager").float().train()
    attention.install(model)
    if dropout:
        add_dropout(model, dropout)
    ids = torch.zeros(shape.size, dtype=torch.int64)
    parameters = [p.detach() for p in model.parameters()]
    inputs = (parameters, ids, ids.clone(), Blocks.hidden(ids, shape.block), ids.clone())
    graph = make_fx(training_pass(model, shape.half))(*inputs)
    aoti_compile_and_package(torch.export.export(graph, inputs, strict=False), package_path=str(path))


def training_pass(model: Any, half: bool) -> Callable[..., tuple[torch.Tensor, ...]]:
    """(parameters, ids, places, what is hidden, labels) to (losses, the gradients of their sum)."""
    names = [name for name, _ in model.named_parameters()]

    def run(parameters: Sequence[torch.Tensor], *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        weights = [p.detach().requires_grad_() for p in parameters]
        with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            losses = _losses(model, dict(zip(names, weights, strict=True)), *inputs)
            return losses, *torch.autograd.grad(losses.sum(), weights)

    return run


def _losses(
    model: Any,
    weights: dict[str, torch.Tensor],
    ids: torch.Tensor,
    place: torch.Tensor,
    hidden_BTK: torch.Tensor,
    labels: torch.Tensor,
) -> torch.Tensor:
    branches = Blocks(hidden_BTK)
    given = {"input_ids": ids[None], "position_ids": place[None], "use_cache": False, "branches": branches}
    logits = torch.func.functional_call(model, weights, kwargs=given).logits[0, :-1].float()
    return nn.functional.cross_entropy(logits, labels[1:], ignore_index=format.IGNORE, reduction="none")
