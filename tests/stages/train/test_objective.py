"""The training loss against transformers' own: values, gradients, blocks, every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_thoughts.attention.documents import ROUND
from latent_thoughts.config import Train
from latent_thoughts.data import format
from latent_thoughts.data.corpus import Corpus
from latent_thoughts.data.packing import Batches
from latent_thoughts.optim import optimizers
from latent_thoughts.parallel import Ranks
from latent_thoughts.stages.train import layers, loader
from latent_thoughts.stages.train.losses import Behind, losses_by_blocks, soften
from latent_thoughts.stages.train.objective import Objective
from latent_thoughts.stages.train.trainer import Trainer
from latent_thoughts.stages.train.whole import Whole, training_pass
from latent_thoughts.types import Chunk, PackedRow, ThoughtDocument, UserError
from tests.conftest import CONTROLS, VOCABULARY, tiny

FAMILIES = ["llama", "gpt2", "qwen3", "gemma3_text", "gemma2", "gpt_oss"]
MANY = 2**20


def corpus() -> Corpus:
    rng = np.random.default_rng(0)
    sizes = [(5, 3), (9, 4), (1, None), (4, 0), (12, 2), (3, 3), (7, None), (2, 1), (20, 9)]
    documents = []
    for n, (text, thought) in enumerate(sizes):
        x = tuple(rng.integers(0, 17, text).tolist())
        z = () if thought is None else (tuple(rng.integers(0, 17, thought).tolist()),)
        documents.append(ThoughtDocument(str(n), (Chunk(str(n), 0, 0, "", x),), (z,), (True,), "test"))
    return Corpus.of(documents)


CONFIG = Train(sequence_length=48, rows=2, layout="posterior", clip=1e9)


def batch(config: Train = CONFIG) -> loader.Batch:
    return next(loader.load(Batches(corpus(), CONTROLS, config, 0), Ranks()))


def alone(model: Any, row: PackedRow) -> torch.Tensor:
    """The losses of a row's documents, one forward pass of the model's own attention each."""
    losses = []
    for number in range(row.document_ids.max() + 1):
        ids, labels = row.ids[row.document_ids == number], row.labels[row.document_ids == number]
        keep = np.flatnonzero(labels != format.IGNORE)
        logprobs = torch.log_softmax(model(torch.from_numpy(ids)[None], use_cache=False).logits[0], -1)
        losses.append(-logprobs[keep - 1, ids[keep]])
    return torch.cat(losses)


@pytest.mark.parametrize("logits", [3 * VOCABULARY, MANY], ids=["blocks of 3", "one block"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_batch_has_the_losses_and_gradients_of_its_documents_alone(kind: str, logits: int) -> None:
    """Every family's own attention, a document at a time, against one row without padding; and row by row."""
    reference, given_batch = tiny(kind), batch()
    (micro,) = given_batch.micros
    expected = alone(reference, micro)
    expected.mean().backward()
    for branching in (True, False):
        model = tiny(kind)
        objective = Objective(model, logits)
        assert objective.branching and objective.behind == Behind(1.0, 30.0 if kind == "gemma2" else None)
        if not branching:
            model.set_attn_implementation("eager")
            objective.branching = False
        _, losses, _ = objective(micro)
        assert torch.allclose(losses, expected, atol=1e-5)
        t = Trainer(objective, [], Batches(corpus(), CONTROLS, CONFIG, 0), CONFIG, 0)
        assert t.step(given_batch, 0.0)["loss"] == pytest.approx(float(expected.mean()), abs=1e-5)
        for (name, found), same in zip(model.named_parameters(), reference.parameters(), strict=True):
            assert torch.allclose(found.grad, same.grad, atol=1e-5), (branching, name)


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind != "gpt_oss"])  # which has no float64
def test_documents_that_attend_in_squares_have_the_same_losses(kind: str) -> None:
    """What half precision does on a CPU, in float64, where the two must agree."""
    (micro,) = batch().micros
    expected = alone(tiny(kind).double(), micro)
    _, losses, _ = Objective(tiny(kind).double(), MANY)(micro)
    assert torch.allclose(losses.double(), expected, atol=1e-5)


@pytest.mark.parametrize("kind", FAMILIES)
def test_rows_in_half_precision_grow_to_few_lengths_and_keep_their_losses(kind: str) -> None:
    """By tokens that nothing looks at: the loss and its gradient are those of the documents alone."""
    (micro,) = batch(CONFIG.model_copy(update={"sequence_length": 40})).micros
    reference, model, lengths = tiny(kind), tiny(kind), []
    model.get_input_embeddings().register_forward_hook(lambda _, given, __: lengths.append(given[0].shape[1]))
    objective, expected = Objective(model, MANY), alone(reference, micro)
    lengths.clear()
    with torch.autocast("cpu", torch.bfloat16):
        total, losses, _ = objective(micro)
    assert len(micro.ids) % ROUND and lengths == [len(micro.ids) + -len(micro.ids) % ROUND]
    assert (losses - expected).abs().max() < 0.05
    total.backward()
    expected.sum().backward()
    for found, same in zip(model.parameters(), reference.parameters(), strict=True):
        assert (found.grad - same.grad).norm() <= 0.05 * same.grad.norm() + 1e-3


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LATENT = {"num_key_value_heads": 4, "head_dim": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
          "qk_rope_head_dim": 4, "v_head_dim": 8}  # fmt: skip
BEHIND = {
    "granite": ({"logits_scaling": 8.0}, Behind(1 / 8)),
    "cohere": ({"logit_scale": 0.0625}, Behind(0.0625)),
    "hyperclovax": ({"logits_scaling": 0.5}, Behind(0.5)),
    "minicpm3": (LATENT | {"dim_model_base": 4}, Behind(1 / 8)),  # which divides what it gives its head
    "gemma2": ({"head_dim": 8, "final_logit_softcapping": 1.5}, Behind(1.0, 1.5)),
    "llama": ({"final_logit_softcapping": 30.0, "logits_scaling": 8.0}, Behind()),  # which it does not look at
    "nanochat": ({"final_logit_softcapping": 15.0}, Behind(1.0, 15.0)),
}


@pytest.mark.parametrize("kind", BEHIND)
def test_logits_that_are_scaled_or_capped_are_taken_in_blocks(kind: str) -> None:
    """Losses and gradients are those of the model's own logits, of which no more exist at a time than asked for."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes, behind = BEHIND[kind]
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 17, "eos_token_id": 18, "pad_token_id": 18}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **tokens, **SIZES, **sizes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    (micro,) = batch().micros
    expected = alone(model, micro)
    slopes = torch.autograd.grad(expected.sum(), list(model.parameters()))
    objective = Objective(model, 3 * VOCABULARY)
    assert objective.behind == behind
    held: list[int] = []
    model.lm_head.register_forward_hook(lambda _, __, out: held.append(out.numel()))
    total, losses, _ = objective(micro)
    assert not held and torch.allclose(losses, expected, atol=1e-5)
    total.backward()
    for (name, found), slope in zip(model.named_parameters(), slopes, strict=True):
        assert torch.allclose(found.grad, slope, atol=2e-5), name


def test_logits_of_an_unknown_make_are_the_models_own() -> None:
    model = tiny("llama")
    model.register_forward_hook(lambda _, __, out: out | {"logits": out.logits.square()})
    objective = Objective(model, 3 * VOCABULARY)
    assert objective.behind is None
    (micro,) = batch().micros
    assert objective(micro)[0].requires_grad


def test_a_model_without_one_that_gives_hidden_states_is_known_by_its_logits() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    more = {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2}
    config = AutoConfig.for_model("llama4_text", vocab_size=VOCABULARY, pad_token_id=18, **SIZES, **more)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    (micro,) = batch().micros
    objective = Objective(model, MANY)
    assert objective.behind is None and torch.allclose(objective(micro)[1], alone(model, micro), atol=1e-5)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 9),
    st.integers(1, 12),
    st.integers(1, 7),
    st.booleans(),
    st.builds(Behind, st.sampled_from([1.0, 0.25, 3.0]), st.sampled_from([None, 2.0])),
    st.integers(0, 3),
)
def test_losses_by_blocks_are_those_of_the_whole(
    n: int, v: int, block: int, bias: bool, behind: Behind, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(n, 5, generator=g, dtype=torch.float64), torch.randn(v, 5, generator=g).double()
    offset = torch.randn(v, generator=g).double() if bias else None
    targets = torch.randint(v, (n,), generator=g)
    found = [x.clone().float().requires_grad_() if x is not None else None for x in (hidden, weight, offset)]
    plain = [x.clone().requires_grad_() if x is not None else None for x in (hidden, weight, offset)]
    total, losses = losses_by_blocks(*found, targets, block, behind)
    logits = torch.nn.functional.linear(*plain) * behind.scale
    if behind.cap:
        logits = behind.cap * torch.tanh(logits / behind.cap)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    assert torch.allclose(losses.double(), expected, atol=1e-4)
    (total * 0.5).backward()
    (expected.sum() * 0.5).backward()
    for a, b in zip(found, plain, strict=True):
        assert a is None or torch.allclose(a.grad.double(), b.grad, atol=1e-4)


@pytest.mark.parametrize("behind", [Behind(), Behind(0.5, 2.0)], ids=["plain", "capped"])
@pytest.mark.parametrize("bias", [False, True])
def test_losses_as_a_compiler_sees_them(bias: bool, behind: Behind) -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight, offset = (torch.randn(*shape, generator=g) for shape in ((40, 5), (7, 5), (7,)))
    targets, found = torch.randint(7, (40,), generator=g), []
    for how in (soften, torch.compile(soften, backend="aot_eager", dynamic=True)):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, offset)]
        total, losses = losses_by_blocks(*leaves[:2], leaves[2] if bias else None, targets, 16, behind, how)
        total.backward()
        found.append([losses, *(x.grad for x in leaves[: 2 + bias])])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*found, strict=True))


def test_a_weight_in_half_precision_gets_the_sum_of_all_blocks_rounded_once() -> None:
    """As where FSDP gathers it so: two hundred sums would each be rounded."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(800, 8, generator=g).bfloat16(), torch.randn(5, 8, generator=g).bfloat16()
    targets = torch.randint(0, 5, (800,), generator=g)
    found = []
    for block in (1, 800):
        leaf = weight.clone().requires_grad_()
        losses_by_blocks(hidden, leaf, None, targets, block)[0].backward()
        found.append(leaf.grad.float())  # pyright: ignore[reportOptionalMemberAccess]
    assert (found[0] - found[1]).norm() < 0.004 * found[1].norm()


def test_no_gradient_no_work_for_one() -> None:
    objective = Objective(tiny("llama"), MANY)
    with torch.no_grad():
        total, losses, parts = objective(batch().micros[0])
    assert not total.requires_grad and len(losses) == len(parts)


def test_micro_batches_give_the_gradient_of_the_whole() -> None:
    found = []
    for micro in (None, 1, 3):
        config = CONFIG.model_copy(update={"micro_rows": micro, "rows": 4})
        t = Trainer(Objective(tiny("llama"), MANY), [], Batches(corpus(), CONTROLS, config, 0), config, 0)
        losses = t.step(batch(config), 0.0)
        found.append((losses["loss"], losses["norm"]))
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[2] == pytest.approx(found[0], rel=1e-5)


def test_without_clipping_gradients_are_what_they_are() -> None:
    found = []
    for clip in (0.0, 1e9, 1e-3):
        t = Trainer(Objective(tiny("llama"), MANY), [], Batches(corpus(), CONTROLS, CONFIG, 0), CONFIG, 0)
        t.config = CONFIG.model_copy(update={"clip": clip})
        t.step(batch(), 0.0)
        found.append([p.grad for p in t.objective.parameters()])
    assert all(map(torch.equal, found[0], found[1]))
    assert not any(map(torch.equal, found[0], found[2]))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text"])
def test_checkpointed_activations_give_the_same_gradient(kind: str) -> None:
    gradients = []
    for checkpointed in (False, True):
        model = tiny(kind).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        Objective(model, MANY)(batch().micros[0])[0].backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


@pytest.mark.slow
def test_compiled_blocks_give_the_same_gradient() -> None:
    gradients = []
    for compiled in (False, True):
        model = tiny("llama").train()
        objective = Objective(model, MANY)
        if compiled:
            objective.compile_blocks(model.device)
        for n in (0, 1):  # rows of different lengths
            config = CONFIG.model_copy(update={"rows": 1 + n})
            objective(batch(config).micros[0])[0].backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients, strict=True))


def gradients(model: Any, objective: Objective, rows: tuple[int, ...]) -> list[torch.Tensor]:
    for n in rows:
        total, losses, parts = objective(batch(CONFIG.model_copy(update={"rows": n})).micros[0])
        assert torch.isclose(losses.sum(), total.detach()) and len(parts) == len(losses)
        total.backward()
    return [p.grad for p in model.parameters()]


class Uncompiled:
    """A library whose pass is run as it is."""

    def __init__(self, model: Any):
        self.run, self.parameters = training_pass(model, False), len(list(model.parameters()))

    def boxed_run(self, given: list[torch.Tensor]) -> list[torch.Tensor]:
        return [x.detach() for x in self.run(given[: self.parameters], *given[self.parameters :])]


@pytest.mark.parametrize("kind", [*FAMILIES[:1], *FAMILIES[2:], "compiled"])
def test_a_compiled_pass_gives_the_same_gradient(kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is compiled, as it is; and compiled."""
    if kind != "compiled":
        monkeypatch.setattr(Whole, "_library", lambda self, shape: Uncompiled(self.model))
    elif not layers.compiler():
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("LATENT_THOUGHTS_CACHE", str(tmp_path))
    rows = (2, 2) if kind == "compiled" else (1, 2, 1, 2, 2)  # of different lengths; one library is enough
    plain, whole = (tiny("llama" if kind == "compiled" else kind).train() for _ in range(2))
    found = gradients(whole, Objective(whole, MANY, Whole(whole, 48, MANY)), rows)
    expected = gradients(plain, Objective(plain, MANY), rows)
    assert all(torch.allclose(a, b, atol=3e-5) for a, b in zip(found, expected, strict=True))
    if kind == "compiled":  # once, and for other weights the same
        made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt2")}
        assert len(made) == 1
        other = tiny("llama").train()
        again = gradients(other, Objective(other, MANY, Whole(other, 48, MANY)), rows)
        assert all(map(torch.equal, again, found))
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt2")} == made


@pytest.mark.slow
def test_a_compiler_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LATENT_THOUGHTS_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "/bin/false")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = tiny("llama").train()
    with pytest.raises(UserError, match="train.compile: whole could not compile this model") as told:
        Objective(model, MANY, Whole(model, 48, MANY))(batch().micros[0])
    assert "\n" not in str(told.value)


def test_a_damaged_library_is_named_and_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def cut_short(self: Whole, shape: Any, path: Path) -> None:
        path.parent.mkdir(parents=True)
        path.write_bytes(b"PK and no more")

    monkeypatch.setenv("LATENT_THOUGHTS_CACHE", str(tmp_path))
    monkeypatch.setattr(Whole, "_make", cut_short)
    model = tiny("llama").train()
    with pytest.raises(UserError, match=r"\.pt2 was damaged and is now removed: start again \(.+\)$"):
        Objective(model, MANY, Whole(model, 48, MANY))(batch().micros[0])
    assert not list(tmp_path.rglob("*.pt2"))


def test_what_a_compiled_pass_does_not_do_is_refused() -> None:
    model = tiny("llama").train()
    with pytest.raises(UserError, match="train.compile: whole holds logits of 128 positions"):
        Objective(model, MANY, Whole(model, 48, 127 * VOCABULARY))(batch().micros[0])
    model.register_buffer("seen", torch.zeros(1))
    with pytest.raises(UserError, match="leaves buffers as they begin, such as seen"):
        Whole(model, 48, MANY)


def test_dropout_is_active_in_training_alone() -> None:
    model = tiny("llama").train()
    layers.add_dropout(model, 0.5)
    objective, micro = Objective(model, MANY), batch().micros[0]
    assert model.training  # the probe of the head leaves it so
    assert not torch.equal(objective(micro)[1], objective(micro)[1])
    model.eval()
    assert torch.equal(objective(micro)[1], objective(micro)[1])


def test_muon_takes_hidden_matrices_alone() -> None:
    model = tiny("llama")
    adamw, muon = optimizers(model, Train(optimizer="muon"))
    shapes = [p.shape for group in muon.param_groups for p in group["params"]]
    assert len(shapes) == 14
    assert all(len(s) == 2 and VOCABULARY not in s for s in shapes)
    assert sum(len(g["params"]) for g in adamw.param_groups) == 7  # two embeddings, five norms
