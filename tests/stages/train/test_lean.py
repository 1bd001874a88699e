"""Layers in fewer passes: the same values and gradients, in every family, and less kept."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import nn

from latent_thoughts.stages.train import lean
from tests.conftest import VOCABULARY, tiny

IDS = torch.arange(24).view(1, 24) % VOCABULARY


def passed(model: Any, half: bool) -> list[torch.Tensor]:
    """Logits, and the gradients of their squares."""
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        logits = model(IDS, use_cache=False).logits
    logits.square().mean().backward()
    return [logits.detach(), *(p.grad for p in model.parameters())]


def changed(model: nn.Module) -> dict[str, int]:
    names = [type(module).__name__ for module in model.modules() if "forward" in vars(module)]
    return {name: names.count(name) for name in names}


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("llama", {"LlamaRMSNorm": 5, "LlamaMLP": 2}),
        ("gpt2", {}),
        ("qwen3", {"Qwen3RMSNorm": 9, "Qwen3MLP": 2}),
        ("gemma3_text", {"Gemma3RMSNorm": 13}),  # around one; its gate is no SiLU
        ("gpt_oss", {"GptOssRMSNorm": 5}),
    ],
)
def test_every_family_has_the_same_values_and_gradients(kind: str, expected: dict[str, int], half: bool) -> None:
    plain, model = tiny(kind), tiny(kind)
    lean.install(model, 0)
    assert changed(model) == expected
    far = 0.03 if half else 1e-5
    for one, other in zip(passed(plain, half), passed(model, half), strict=True):
        assert (one - other).norm() <= far * one.norm() + 1e-6


def test_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    x, weight, up = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 7), (7,), (2, 3, 7))
    )
    assert torch.autograd.gradcheck(lambda x, w: lean.RMSNorm.apply(x, w, 1e-2), (x, weight))
    assert torch.autograd.gradcheck(lean.SiLUGate.apply, (x, up))


def test_a_layer_that_does_something_else_is_left_alone() -> None:
    class TwiceRMSNorm(nn.RMSNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    class GatedRMSNorm(nn.RMSNorm):
        def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
            return super().forward(x) if gate is None else gate * super().forward(x)

    class FixedRMSNorm(nn.RMSNorm):
        def __init__(self, width: int, eps: float):
            super().__init__(width, eps, elementwise_affine=False)
            del self.weight
            self.register_buffer("weight", torch.ones(width))

    kinds: list[Any] = [nn.RMSNorm, TwiceRMSNorm, GatedRMSNorm, FixedRMSNorm]
    model = nn.Sequential(*(kind(8, eps=1e-6) for kind in kinds), nn.RMSNorm(8, eps=1e-6, elementwise_affine=False))
    x = torch.randn(3, 8)
    expected = model(x)
    lean.install(model, 0)
    assert changed(model) == {"RMSNorm": 1} and torch.allclose(model(x), expected, atol=1e-6)


def test_layers_that_differ_for_small_or_large_tokens_alone_are_left_alone() -> None:
    """As DeepSeek V4's and GLM 5's MLPs, whose gates are capped, and a norm that adds its epsilon to the root."""

    class CappedMLP(nn.Module):
        def __init__(self, cap: float):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(8, 8, bias=False) for _ in range(3))
            self.act_fn, self.cap = nn.SiLU(), cap

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gate, up = self.gate_proj(x).clamp(max=self.cap), self.up_proj(x).clamp(-self.cap, self.cap)
            return self.down_proj(self.act_fn(gate) * up)

    class OutsideRMSNorm(nn.RMSNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps) * self.weight

    torch.manual_seed(0)
    model = nn.ModuleList([CappedMLP(10.0), CappedMLP(torch.inf), OutsideRMSNorm(8, eps=1e-5), nn.RMSNorm(8, eps=1e-5)])
    lean.install(model, 0)
    assert ["forward" in vars(layer) for layer in model] == [False, True, False, True]


def test_narrow_layers_are_left_alone() -> None:
    model = tiny("llama")
    lean.install(model)
    assert not changed(model) and not any(module._forward_pre_hooks for module in model.modules())


def test_a_copy_of_a_model_has_weights_of_its_own() -> None:
    model = nn.Sequential(nn.RMSNorm(8, eps=1e-6))
    lean.install(model, 0)
    other, x = copy.deepcopy(model), torch.randn(3, 8)
    with torch.no_grad():
        other[0].weight.mul_(3)
    assert torch.allclose(other(x), 3 * model(x))


def test_what_layers_share_is_cast_once_and_not_kept() -> None:
    first, second, x = nn.Linear(4, 4), nn.Linear(4, 4), torch.randn(2, 4, requires_grad=True)
    lean.install(nn.ModuleList([first, second]), 0)
    seen: list[torch.Tensor] = []
    for layer in (first, second):
        layer.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    with torch.autocast("cpu", torch.bfloat16):
        (first(x) + second(x)).sum().backward()
        with torch.no_grad():
            x.add_(1)  # in place: another value
        first(x)
    one, same, other = seen
    assert one.data_ptr() == same.data_ptr() != other.data_ptr() and one.dtype == torch.bfloat16
    assert torch.equal(other, x.bfloat16())
    assert torch.allclose(x.grad, (first.weight + second.weight).sum(0).expand(2, 4), atol=0.02)  # pyright: ignore
    first(x)  # without autocast there is nothing to cast
    assert seen[-1] is x
    (shared,) = {id(h): h for h in first._forward_pre_hooks.values()}.values()
    del x, one, same, other
    seen.clear()
    gc.collect()
    assert isinstance(shared, lean.SharedCast) and shared.cast is None


def test_a_layer_keeps_less_for_its_gradient() -> None:
    def kept(model: Any) -> int:
        sizes: dict[int, int] = {}

        def pack(x: torch.Tensor) -> torch.Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", torch.bfloat16):
            out = model(IDS, use_cache=False).logits
        assert out.requires_grad
        return sum(sizes.values())

    plain, model = tiny("llama"), tiny("llama")
    lean.install(model, 0)
    assert kept(model) < 0.85 * kept(plain)


def test_activations_may_be_computed_again() -> None:
    found = []
    for checkpointed in (False, True):
        model = tiny("llama").train()
        lean.install(model, 0)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        found.append(passed(model, True))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
