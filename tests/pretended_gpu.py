"""A GPU for machines that have none.

Its tensors are a CPU's that say they lie on cuda:0. They refuse to meet tensors of the CPU where CUDA's would, and to
become numpy arrays. Kernels, memory, streams and speed are not pretended; flash attention over rows is, by its rule.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from latent_thoughts.engines import replay

HALF = (torch.bfloat16, torch.float16)
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
aten = torch.ops.aten
# CUDA's tensors meet the CPU's in copies, and where a CPU's are their indices
MAY_MEET = {aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.index_put.default,
            aten.index_put_.default, aten._index_put_impl_.default}  # fmt: skip
CUDA = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "device_count": lambda: 1,
    "get_device_name": lambda *_: "a pretended GPU",
    "get_device_capability": lambda *_: (8, 0),
    "is_bf16_supported": lambda *_, **__: True,
    "manual_seed": torch.manual_seed,
    "max_memory_allocated": lambda *_: 10**9,
    "mem_get_info": lambda *_: (2**33, 2**34),
    "set_device": lambda _: None,
    "get_sync_debug_mode": lambda: 0,
    "set_sync_debug_mode": lambda _: None,
    "synchronize": lambda *_: None,
    "empty_cache": lambda: None,
}


class Pretended(torch.Tensor):
    """A tensor on the GPU; `held` is the CPU's, in the same memory."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # `Api` does it
    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Pretended:
        made = torch.Tensor._make_subclass(cls, held)
        made.held = held.detach()
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        strangers = [tuple(x.shape) for x in tensors if not isinstance(x, Pretended) and x.ndim]
        if strangers and function not in MAY_MEET:
            raise RuntimeError(f"{function}: tensors on cuda:0 and on the CPU, of the latter {strangers}")
        there = KERNELS.get(function._schema.name, function)
        given, named = tree_map(lambda x: x.held if isinstance(x, Pretended) else x, (args, kwargs))
        out = there(*given, **named)
        if strangers and not isinstance(args[0], Pretended) and function is not aten._to_copy.default:
            return args[0] if function._schema.is_mutable else out  # it went to the CPU
        return return_and_correct_aliasing(function, args, kwargs, on_gpu(out))


def on_gpu(found: Any) -> Any:
    plain = lambda x: isinstance(x, torch.Tensor) and not isinstance(x, Pretended)  # noqa: E731
    return tree_map(lambda x: Pretended(x) if plain(x) else x, found)


class ToGPU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> Any:
        return Pretended(x.detach().clone())

    @staticmethod
    def backward(ctx: Any, slope: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return slope.held


class ToCPU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> torch.Tensor:
        return x.held.clone()

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return Pretended(slope)


class Api(TorchFunctionMode):
    """What Python sees of a device: where a tensor lies, where one is made, and how it gets from one to the other."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, first = kwargs or {}, args[0] if args else None
        if function in (torch.device, torch._C._nn._parse_to):  # pyright: ignore[reportAttributeAccessIssue]
            return function(*args, **kwargs)
        if isinstance(first, Pretended) and function in SEEN:
            return SEEN[function](*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        named = {kind for kind in ("cpu", "cuda") if any(_names(x, kind) for x in leaves)}
        if function is torch.Tensor.to and len(args) > 1 and isinstance(args[1], torch.Tensor):  # like another
            named = {"cuda" if isinstance(args[1], Pretended) else "cpu"}
            args = (first, args[1].dtype, *args[2:])
        args, kwargs = tree_map(lambda x: CPU if _names(x, "cuda") else x, (args, kwargs))
        out = function(*args, **kwargs)
        if function is torch.Tensor.to:
            if "cuda" in named and not isinstance(out, Pretended):
                return ToGPU.apply(out)
            return ToCPU.apply(out) if "cpu" in named and isinstance(out, Pretended) else out
        return on_gpu(out) if "cuda" in named else out


def _names(x: Any, kind: str) -> bool:
    return x.type == kind if isinstance(x, torch.device) else isinstance(x, str) and x == kind


def _refuse(*_: Any) -> Any:
    raise TypeError("can't convert a tensor on cuda:0 to numpy")


def _attention(*args: Any, **kwargs: Any) -> Any:
    """In one: below Python it makes masks, where nobody can pretend. What only plain products can do is refused:
    key-value heads with several queries, but for flash attention, which takes half precision without a mask."""
    assert all(isinstance(x, Pretended) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor))
    query, _, value, mask = (*args, kwargs.get("attn_mask"))[:4]
    grouped = kwargs.get("enable_gqa", False)
    assert not grouped or (query.dtype in HALF and mask is None and query.shape[3] == value.shape[3] <= 256)
    args, kwargs = tree_map(lambda x: ToCPU.apply(x) if isinstance(x, Pretended) else x, (args, kwargs))
    return ToGPU.apply(torch.nn.functional.scaled_dot_product_attention(*args, **kwargs))


SEEN: dict[Any, Any] = {
    torch.Tensor.device.__get__: lambda *_: GPU,  # pyright: ignore[reportAttributeAccessIssue]
    torch.Tensor.is_cuda.__get__: lambda *_: True,  # pyright: ignore[reportAttributeAccessIssue]
    torch.Tensor.get_device: lambda _: 0,
    torch.Tensor.cpu: ToCPU.apply,
    torch.Tensor.tolist: lambda x: x.held.tolist(),
    torch.Tensor.numpy: _refuse,
    torch.Tensor.__array__: _refuse,
    torch.nn.functional.scaled_dot_product_attention: _attention,
}


class Autocast(contextlib.ExitStack):
    """Of the GPU means the CPU's too, where the products are really taken."""

    def __init__(self, device_type: str, *args: Any, real: Any = torch.autocast, **kwargs: Any):
        super().__init__()
        self.parts = [real(kind, *args, **kwargs) for kind in {device_type, "cpu"}]

    def __enter__(self) -> Any:
        for part in self.parts:
            self.enter_context(part)
        return super().__enter__()


def _attend(q_NHD: Any, k_NJD: Any, v_NJD: Any, ends: Any, ends_k: Any, longest: int, longest_k: int, causal: bool,
            scale: float, window: Sequence[int]) -> torch.Tensor:  # fmt: skip
    """What flash attention over rows says of itself, and asks of what it is given. The last query of a part stands at
    its last key."""
    assert q_NHD.dtype in HALF and ends.dtype == ends_k.dtype == torch.int32 and len(ends) == len(ends_k)
    assert q_NHD.shape[2] == v_NJD.shape[2] <= 256 and all(x.is_contiguous() for x in (q_NHD, k_NJD, v_NJD))
    assert q_NHD.shape[2] % 8 == 0 and window[1] == 0
    sizes, sizes_k = ends.diff().tolist(), ends_k.diff().tolist()
    assert (int(ends[0]), sum(sizes)) == (0, len(q_NHD)) and longest >= max(sizes)
    assert (int(ends_k[0]), sum(sizes_k)) == (0, len(k_NJD)) and longest_k >= max(sizes_k)
    out, keys = [], (x.float().split(sizes_k) for x in (k_NJD, v_NJD))
    for q, k, v in zip(q_NHD.float().split(sizes), *keys, strict=True):
        ahead = len(k) - len(q)
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1).transpose(0, 1) for x in (k, v))
        seen = torch.ones(len(q), len(q) + ahead, dtype=torch.bool).tril(ahead)
        if window[0] >= 0:
            seen = seen.triu(ahead - window[0])
        scores = (scale * q.transpose(0, 1) @ k.mT).masked_fill(~seen, -torch.inf)
        out.append((torch.softmax(scores, -1) @ v).transpose(0, 1))
    return torch.cat(out).to(q_NHD.dtype)


def _forward(q: Any, k: Any, v: Any, *given: Any) -> Any:
    *bounds, grouped = given[:8]
    assert grouped and given[8:] == (None,) * len(given[8:])
    return _attend(q, k, v, *bounds), torch.zeros(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64)


def _backward(slope: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, *given: Any) -> Any:
    *bounds, _, scale, window = given

    def work() -> Any:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(_attend(*leaves, *bounds, scale, window), leaves, slope)

    with ThreadPoolExecutor(1) as elsewhere:  # here there are no gradients, below autograd
        return elsewhere.submit(work).result()


KERNELS = {  # what a CPU has not
    "torch_attn::_varlen_attn": _forward,
    "torch_attn::_varlen_attn_backward": _backward,
    "aten::histc": lambda x, *given: torch.histc(x.float(), *given).to(x.dtype),
}


def _record(work: Callable[[], torch.Tensor], device: torch.device) -> tuple[Callable[[], None], torch.Tensor]:
    out = work()
    return lambda: (out.copy_(work()), None)[1], out


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """This machine has one, of the kind that has flash attention, for this thread."""
    from torch.distributed.checkpoint import filesystem  # it copies from a GPU in a stream beside the others

    with contextlib.ExitStack() as stack:
        for name, value in CUDA.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        stack.enter_context(patch.object(torch, "autocast", Autocast))
        stack.enter_context(patch.object(replay, "record", _record))
        loader = filesystem._SerialCpuLoader
        stack.enter_context(patch.object(filesystem, "_OverlappingCpuLoader", lambda resolve, **_: loader(resolve)))
        stack.enter_context(patch.object(torch.__future__, "_swap_module_params_on_conversion", True))
        stack.enter_context(Api())
        yield
