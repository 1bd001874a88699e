"""Muon over stacks against torch's own, which takes one matrix after the other in bf16."""

from __future__ import annotations

import copy

import pytest
import torch

from latent_thoughts.config import Train
from latent_thoughts.optim import Muon, optimizers, orthogonalise
from tests.conftest import tiny

SHAPES = [(8, 8), (16, 6), (6, 16), (8, 8), (16, 6), (5, 7)]


def matrices() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.95, 0.1), (0.5, 0.0)])
def test_steps_equal_torchs(momentum: float, weight_decay: float) -> None:
    ours = matrices()
    theirs, start = copy.deepcopy(ours), copy.deepcopy(ours)
    optimizers = (
        Muon(ours, lr=0.02, momentum=momentum, weight_decay=weight_decay),
        torch.optim.Muon(theirs, lr=0.02, momentum=momentum, weight_decay=weight_decay),
    )
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, s in zip(ours, theirs, start, strict=True):
        moved = (b - s).norm()
        assert moved > 0.05
        assert (a - b).norm() < 0.02 * moved, tuple(a.shape)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 12, 5), (2, 5, 12), (1, 1, 9)])
def test_singular_values_come_near_one_and_directions_stay(shape: tuple[int, int, int]) -> None:
    stack = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    result = orthogonalise(stack)
    assert result.shape == stack.shape
    for before, after in zip(stack, result, strict=True):
        u, s, vh = torch.linalg.svd(before, full_matrices=False)
        rotated = u.mT @ after @ vh.mT
        large = s > 0.1 * s[0]  # five steps do not lift the smallest all the way
        assert torch.allclose(rotated, torch.diag(rotated.diagonal()), atol=1e-4)
        assert ((rotated.diagonal()[large] > 0.6) & (rotated.diagonal()[large] < 1.3)).all()


def test_matrices_of_a_stack_do_not_affect_each_other() -> None:
    stack = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(3))
    alone = torch.cat([orthogonalise(stack[n : n + 1]) for n in range(3)])
    assert torch.allclose(orthogonalise(stack), alone, atol=1e-6)


def test_a_matrix_without_gradient_stays_and_a_zero_gradient_is_harmless() -> None:
    without, zero = torch.nn.Parameter(torch.ones(3, 4)), torch.nn.Parameter(torch.ones(3, 4))
    zero.grad = torch.zeros(3, 4)
    Muon([without, zero], lr=0.1, weight_decay=0.5).step()
    assert torch.equal(without, torch.ones(3, 4))
    assert torch.allclose(zero, torch.full((3, 4), 0.95))


def test_saved_state_continues_as_if_uninterrupted() -> None:
    def steps(parameters: list[torch.nn.Parameter], optimizer: Muon, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()

    whole = matrices()
    optimizer = Muon(whole)
    steps(whole, optimizer, 1)
    resumed, state = copy.deepcopy(whole), copy.deepcopy(optimizer.state_dict())
    steps(whole, optimizer, 2)
    other = Muon(resumed)
    other.load_state_dict(state)
    steps(resumed, other, 2)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def test_state_that_is_there_from_the_start_changes_no_step_of_adamw() -> None:
    """Nor what a parameter becomes that gets no gradient."""
    ours, theirs = tiny("llama"), tiny("llama")
    config = Train(lr=0.01, weight_decay=0.1)
    (adamw,) = optimizers(ours, config)
    lazy = torch.optim.AdamW(theirs.parameters(), lr=0.01, betas=config.betas, weight_decay=0.1, fused=True)
    assert len(adamw.state) == len(list(ours.parameters()))
    for step in range(3):
        for model, optimizer in ((ours, adamw), (theirs, lazy)):
            ids = torch.arange(step, step + 8)[None]
            model(input_ids=ids, labels=ids).loss.backward()
            model.model.norm.weight.grad = None
            optimizer.step()
            optimizer.zero_grad()
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
    assert torch.equal(ours.model.norm.weight, tiny("llama").model.norm.weight)


def test_matrices_that_are_kept_transposed_take_the_same_step() -> None:
    """Of one shape with others that are not."""
    generator = torch.Generator().manual_seed(0)
    start, gradient = torch.randn(6, 16, generator=generator), torch.randn(6, 16, generator=generator)
    wide, tall, also_wide = (torch.nn.Parameter(x.clone()) for x in (start, start.T, start))
    optimizer = Muon([wide, tall, also_wide], transposed=[wide])
    wide.grad, tall.grad, also_wide.grad = gradient, gradient.T.contiguous(), gradient.clone()
    optimizer.step()
    assert torch.allclose(wide.T, tall, atol=1e-6) and not torch.allclose(wide, also_wide, atol=1e-3)


def test_muon_leaves_gpt2s_positions_alone_and_knows_its_layers() -> None:
    model = tiny("gpt2")
    adamw, muon = optimizers(model, Train(optimizer="muon"))
    names = {id(p): name for name, p in model.named_parameters()}
    hidden = [names[id(p)] for group in muon.param_groups for p in group["params"]]
    assert hidden == [
        name for name in names.values() if ".h." in name and name.endswith("weight") and ".ln_" not in name
    ]
    assert {names[n] for n in muon.transposed} == set(hidden)
    assert {"transformer.wte.weight", "transformer.wpe.weight"} <= {names[id(p)] for p in adamw.state}
