"""Layers that most models have, in fewer passes over memory and with fewer tensors kept for the backward pass.

What a compiler would do, for models that run as they are. A layer is changed where it then gives the same numbers, as
is tried on three tokens, and else left alone.

Axis suffixes: N tokens (of any batch shape), D width.
"""

from __future__ import annotations

import inspect
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

Forward = Callable[[Any, torch.Tensor], torch.Tensor]


def install(model: Any, least: int = 256) -> None:
    """Changes the RMS norms, SiLU-gated MLPs and linear layers of a model in float32, in place.

    Not those narrower than `least`: there calls from Python cost more than passes over memory do (docs/log.md).
    """
    shared = SharedCast()
    for module in model.modules():
        width, forwards = _leaner(module)
        if forwards and width >= least:
            _change(module, width, *forwards)
        if isinstance(module, nn.Linear) and module.in_features >= least:
            module.register_forward_pre_hook(shared)


def _leaner(module: Any) -> tuple[int, Sequence[Forward]]:
    """A layer's width, and the forward passes that may be its own."""
    if len(inspect.signature(module.forward).parameters) != 1:
        return 0, ()
    weight = getattr(module, "weight", None)
    if type(module).__name__.endswith("RMSNorm") and isinstance(weight, nn.Parameter) and _eps(module):
        return (len(weight), (_normed, _normed_around_one)) if weight.ndim == 1 else (0, ())
    gated = all(isinstance(getattr(module, name, None), nn.Linear) for name in ("gate_proj", "up_proj", "down_proj"))
    if gated and type(getattr(module, "act_fn", None)).__name__.startswith("SiLU"):
        return module.gate_proj.in_features, (_gated,)
    return 0, ()


def _change(module: Any, width: int, *forwards: Forward) -> None:
    """Gives a module the first of these forward passes that agrees with its own."""
    like = next(module.parameters())
    # a small token shows where a norm adds its epsilon, a large one whether a gate is capped
    size_31 = torch.tensor([[1e-3], [1.0], [1e3]], dtype=like.dtype, device=like.device)
    x_1ND = torch.linspace(-2, 3, 3 * width, dtype=like.dtype, device=like.device).view(1, 3, width) * size_31
    # a norm's weights are all one, or zero, to begin with: with others it shows what it does with them
    given = {name: p + torch.linspace(-1, 2, len(p)).to(p) for name, p in module.named_parameters() if p.ndim == 1}
    with torch.no_grad():
        own = functional_call(module, given, x_1ND)
        for forward in forwards:
            module.forward = types.MethodType(forward, module)
            if torch.allclose(functional_call(module, given, x_1ND), own, rtol=1e-5, atol=1e-6):
                return
    del module.forward


class SharedCast:
    """Forward pre-hook: what several linear layers take, such as queries, keys and values, is cast for autocast once.

    Each has a gradient of its own, so that their sum is float32's.
    """

    def __init__(self) -> None:
        self.given: weakref.ref[torch.Tensor] | None = None
        self.version, self.cast = 0, None

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        x, kind = args[0], args[0].device.type
        if x.dtype != torch.float32 or not torch.is_autocast_enabled(kind):
            return None
        if self.given is None or self.given() is not x or self.version != x._version:
            self.given, self.version = weakref.ref(x, self._forget), x._version
            self.cast = x.detach().to(torch.get_autocast_dtype(kind))
        return (_Cast.apply(x, self.cast), *args[1:])

    def _forget(self, given: Any) -> None:
        if given is self.given:
            self.given = self.cast = None


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cast: torch.Tensor) -> torch.Tensor:
        return cast.detach()

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return slope.float(), None


def _eps(module: Any) -> Any:
    return getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)


def _normed(module: Any, x: torch.Tensor) -> torch.Tensor:
    return _rms_norm(module, x, module.weight)


def _normed_around_one(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Gemma's."""
    return _rms_norm(module, x, 1 + module.weight)


def _rms_norm(module: Any, x: torch.Tensor, weight_D: torch.Tensor) -> torch.Tensor:
    if x.dtype != torch.float32:  # families differ in where they round
        return type(module).forward(module, x)
    eps = _eps(module)
    if x.is_cuda:
        return nn.functional.rms_norm(x, weight_D.shape, weight_D, eps)  # one kernel; on a CPU it is none
    return RMSNorm.apply(x, weight_D, eps)  # pyright: ignore[reportReturnType]


class RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) times a weight (Zhang and Sennrich 2019), keeping x and a number a token."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = (size.square_().div_(x.shape[-1]) + eps).rsqrt_()
        ctx.save_for_backward(x, scale, weight_D)
        return (x * scale).mul_(weight_D)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, scale, weight_D = ctx.saved_tensors
        x_ND, slope_ND, scale_N1 = (t.reshape(-1, t.shape[-1]) for t in (x, slope, scale))
        both_ND = slope_ND * x_ND
        along_N1 = (both_ND @ weight_D[:, None]).mul_(scale_N1.pow(3)).div_(-x.shape[-1])
        dx_ND = (slope_ND * weight_D).mul_(scale_N1).addcmul_(x_ND, along_N1)
        return dx_ND.view_as(x), (scale_N1.T @ both_ND)[0], None


def _gated(module: Any, x: torch.Tensor) -> torch.Tensor:
    return module.down_proj(SiLUGate.apply(module.gate_proj(x), module.up_proj(x)))


class SiLUGate(torch.autograd.Function):
    """silu(gate) * up (Shazeer 2020), keeping both and not silu(gate)."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        gate, up = ctx.saved_tensors
        dup = nn.functional.silu(gate).mul_(slope)
        return torch.ops.aten.silu_backward(slope * up, gate), dup
