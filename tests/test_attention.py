"""Attention of training rows: every path of `Documents` against plain attention, a document at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_thoughts.attention import Blocks, Documents, FlashDocuments, Rule
from latent_thoughts.attention.documents import SQUARE

H, J, D = 4, 2, 8


def plain(rule: Rule, sizes: list[int], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    out = []
    for a, b, c in zip(*(x.split(sizes, 1) for x in (q, k, v)), strict=True):
        n = a.shape[1]
        scores = a @ b.repeat_interleave(H // J, 0).mT * rule.scaling
        if rule.softcap is not None:
            scores = rule.softcap * torch.tanh(scores / rule.softcap)
        back = torch.arange(n)[:, None] - torch.arange(n)
        scores = scores.masked_fill((back < 0) | (back >= (rule.window or n)), -torch.inf)
        if rule.sinks is not None:
            scores = torch.cat([scores, rule.sinks[:, None, None].expand(H, n, 1)], -1)
        out.append(scores.softmax(-1)[..., :n] @ c.repeat_interleave(H // J, 0))
    return torch.cat(out, 1)


def inputs(n: int, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> list[torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return [torch.randn(heads, n, D, generator=made).to(device, dtype).requires_grad_() for heads in (H, J, J)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=5)
    | st.lists(st.integers(1, 3), min_size=4, max_size=9).map(sorted),
    st.none() | st.integers(1, 9),
    st.sampled_from([None, 2.0]),
    st.booleans(),
    st.sampled_from(
        [torch.float32, torch.float64]
    ),  # grouped, or runs of one length; a square a document in the second
)
def test_documents_attend_to_themselves(
    sizes: list[int], window: int | None, softcap: float | None, sinks: bool, dtype: torch.dtype
) -> None:
    logits = torch.linspace(-1, 2, H, dtype=dtype) if sinks else None
    rule = Rule(0.3, window, softcap, logits)
    found, expected = inputs(sum(sizes), dtype), inputs(sum(sizes), torch.float64)
    out = Documents(sizes, torch.device("cpu")).attend(0, *found, rule)
    reference = plain(Rule(0.3, window, softcap, None if logits is None else logits.double()), sizes, *expected)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (out.double() * weights).sum().backward()
    (reference * weights).sum().backward()
    assert torch.allclose(out.double(), reference, atol=1e-5)
    assert all(torch.allclose(a.grad.double(), b.grad, atol=1e-4) for a, b in zip(found, expected, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 16), min_size=1, max_size=9),
    st.none() | st.integers(1, 18),
    st.sampled_from([None, 2.0]),
    st.booleans(),
    st.integers(0, 2),
)
def test_in_blocks_documents_attend_to_themselves(
    sizes: list[int], window: int | None, softcap: float | None, sinks: bool, empty: int
) -> None:
    rule = Rule(0.3, window, softcap, torch.linspace(-1, 2, H, dtype=torch.float64) if sinks else None)
    n, block = sum(sizes), 16
    room = (-(-n // block) + empty) * block
    found, expected = inputs(room, torch.float64), inputs(n, torch.float64)
    with torch.no_grad():
        for a, b in zip(found, expected, strict=True):
            a[:, :n] = b
    numbers = torch.full((room,), -2)
    numbers[:n] = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    out, reference = Blocks(Blocks.hidden(numbers, block)).attend(0, *found, rule)[:, :n], plain(rule, sizes, *expected)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (out * weights).sum().backward()
    (reference * weights).sum().backward()
    assert torch.allclose(out, reference)
    assert all(torch.allclose(a.grad[:, :n], b.grad) for a, b in zip(found, expected, strict=True))
    assert all(torch.count_nonzero(a.grad[:, n:]) == 0 for a in found)


@pytest.mark.parametrize("sizes", [[40, 7, 100], [3, SQUARE + 1, 7, 2]], ids=["short", "short and long"])
def test_half_precision_is_within_its_rounding(sizes: list[int]) -> None:
    found, rule = inputs(sum(sizes), torch.bfloat16), Rule(D**-0.5, None, None, None)
    expected = [x.detach().double().requires_grad_() for x in found]
    out, reference = Documents(sizes, torch.device("cpu")).attend(0, *found, rule), plain(rule, sizes, *expected)
    assert (out.double() - reference).abs().max() < 0.03
    slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    out.backward(slope)
    reference.backward(slope.double())
    assert all((a.grad.double() - b.grad).norm() < 0.01 * b.grad.norm() for a, b in zip(found, expected, strict=True))


def test_values_may_be_narrower_than_keys() -> None:
    sizes, rule = [9, 40, 5], Rule(D**-0.5, None, None, None)
    q, k, v = inputs(sum(sizes), torch.float64)
    narrow = v[..., :3].detach().requires_grad_()
    out, reference = (
        Documents(sizes, torch.device("cpu")).attend(0, q, k, narrow, rule),
        plain(rule, sizes, q, k, narrow),
    )
    assert torch.allclose(out, reference)
    found, expected = (torch.autograd.grad(x.square().sum(), (q, k, narrow)) for x in (out, reference))
    assert all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 5])
def test_flash_attention_over_rows_on_a_gpu(window: int | None) -> None:
    sizes, rule = [40, 7, 100], Rule(D**-0.5, window, None, None)
    found = inputs(sum(sizes), torch.bfloat16, device="cuda")
    expected = [x.detach().cpu().double().requires_grad_() for x in found]
    out, reference = FlashDocuments(sizes, torch.device("cuda")).attend(0, *found, rule), plain(rule, sizes, *expected)
    assert (out.cpu().double() - reference).abs().max() < 0.03
    out.backward(slope := torch.ones_like(out))
    reference.backward(slope.cpu().double())
    for a, b in zip(found, expected, strict=True):
        assert (a.grad.cpu().double() - b.grad).norm() < 0.01 * b.grad.norm()
