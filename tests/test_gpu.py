"""What runs on a GPU, on a pretended one: nothing is left behind on the CPU, and the numbers are the same.

With `-m gpu` on a real one.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from latent_thoughts import attention, parallel
from latent_thoughts import model as models
from latent_thoughts.attention import Documents, Extend, FlashDocuments, Lanes, Rule, Span, documents
from latent_thoughts.config import Engine, Train, resolve
from latent_thoughts.data.corpus import Corpus
from latent_thoughts.data.packing import Batches
from latent_thoughts.em import Loop, Run
from latent_thoughts.engines import replay
from latent_thoughts.engines.base import How, SampleRequest, Sampling, ScoreRequest, Scoring, ask
from latent_thoughts.engines.limits import Limits
from latent_thoughts.engines.passes import Passes
from latent_thoughts.engines.torch_engine import TorchEngine
from latent_thoughts.engines.vllm_engine import imported
from latent_thoughts.optim import optimizers, orthogonalise
from latent_thoughts.parallel import Ranks
from latent_thoughts.stages.train import layers, lean, loader
from latent_thoughts.stages.train.losses import Behind, losses_by_blocks
from latent_thoughts.stages.train.objective import Objective, logits_held
from latent_thoughts.stages.train.trainer import Trainer
from latent_thoughts.stages.train.whole import Whole
from latent_thoughts.types import Chunk, ThoughtDocument, UserError
from tests.conftest import CONTROLS, VOCABULARY, tiny
from tests.pretended_gpu import CUDA, KERNELS, Pretended, pretended_gpu

FAMILIES = ["llama", "gpt2", "qwen3", "gemma3_text", "gemma2", "gpt_oss"]


def test_the_pretended_gpu_refuses_what_a_real_one_does() -> None:
    with pretended_gpu():
        there, here = torch.zeros(3, 4, device="cuda"), torch.zeros(3, 4)
        assert there.device.type == "cuda" and there.is_cuda and not here.is_cuda
        for wrong in (lambda: there + here, lambda: there.index_select(0, torch.tensor([1])), lambda: here.mul_(there)):
            with pytest.raises(RuntimeError, match="cuda:0 and on the CPU"):
                wrong()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        layer = torch.nn.Linear(4, 5).to("cuda")
        layer(there + here.to(there)).sum().backward()
        assert isinstance(layer.weight.grad, Pretended) and not isinstance(there.cpu(), Pretended)


@pytest.fixture(params=["pretended", pytest.param("real", marks=pytest.mark.gpu)])
def gpu(request: pytest.FixtureRequest) -> Any:
    return pretended_gpu if request.param == "pretended" else contextlib.nullcontext


def on_both(work: Any, gpu: Any = pretended_gpu) -> tuple[Any, Any]:
    here = work("cpu")
    with gpu():
        return here, work("cuda")


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_engine_draws_and_scores_the_same(kind: str, gpu: Any) -> None:
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(0, VOCABULARY, n).tolist()) for n in range(1, 13)]
    hows = [How(8, CONTROLS.end, CONTROLS.never_in_thoughts, 1.6), How(8, CONTROLS.end, frozenset(), 0)]
    hows.append(How(8, CONTROLS.end, frozenset(), top_p=0.8))
    drawing: list[Any] = [
        Sampling((SampleRequest(p, (n, n + 100)),), how) for how in hows for n, p in enumerate(prompts)
    ]
    scoring: list[Any] = [Scoring((ScoreRequest(p, (prompts[3], prompts[8], ())),), (1.0, 2.0)) for p in prompts]

    def work(device: str) -> Any:
        engine = TorchEngine(tiny(kind).to(device))
        draws = [draw for (sampled,) in ask(engine, drawing, 3 * prompts[::-1]) for draw in sampled.draws]
        scores = [x for (row,) in ask(engine, scoring, prompts[::-1]) for x in row]
        return [d.ids for d in draws], np.concatenate([np.ravel(x) for x in [*(d.logprobs for d in draws), *scores]])

    (ids, logprobs), (ids_there, logprobs_there) = on_both(work, gpu)
    assert ids == ids_there
    assert logprobs == pytest.approx(logprobs_there, abs=1e-5 if gpu is pretended_gpu else 1e-3)


def test_lanes_are_replayed_while_draws_come_and_go(gpu: Any) -> None:
    """Draws of all lengths in few lanes, so that passes are over places where nothing grows."""
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(0, VOCABULARY, n % 23 + 1).tolist()) for n in range(30)]
    hows = [How(n, CONTROLS.end, CONTROLS.never_in_thoughts, 1.2) for n in (3, 60)]
    drawing: list[Any] = [
        Sampling((SampleRequest(p, (n, n + 100, n + 200)),), hows[n % 2]) for n, p in enumerate(prompts)
    ]
    recorded: list[int] = []

    def work(device: str) -> Any:
        engine = TorchEngine(tiny("llama").to(device), Engine(sequences=12))
        draws = [draw for (sampled,) in ask(engine, drawing, prompts[::-1]) for draw in sampled.draws]
        assert engine.passes.replays == (device == "cuda")
        return [d.ids for d in draws], [x for d in draws for x in d.logprobs]

    real = replay.record
    counted = lambda *given: (recorded.append(1), real(*given))[1]  # noqa: E731
    with patch.object(replay, "record", counted) if gpu is not pretended_gpu else contextlib.nullcontext():
        (ids, logprobs), (ids_there, logprobs_there) = on_both(work, gpu)
    assert ids == ids_there and logprobs == pytest.approx(logprobs_there, abs=1e-4)
    assert gpu is pretended_gpu or 1 <= len(recorded) < 30


def test_a_pass_is_recorded_anew_where_lanes_have_moved() -> None:
    """To the same widths elsewhere too: a replay would write where something else lies by then."""
    lanes = Lanes(2, 1, 512, 8, torch.device("cpu"))
    short, long = (Span(torch.zeros(1, 2, n, 8), torch.zeros(1, 2, n, 8)) for n in (30, 400))
    lanes.fill(0, (short,))
    lanes.fit(1)
    made, widths, before = replay.Replay(lambda *_: torch.zeros(0), lanes, 2), lanes.widths(), lanes.stored[0]
    assert made.suits(lanes, 2) and not made.suits(lanes, 1)
    lanes.fill(1, (long,))
    assert not made.suits(lanes, 2)
    lanes.fill(1, (short,))
    assert lanes.widths() == widths and lanes.stored[0] is not before and not made.suits(lanes, 2)


def few_draws(device: str, **settings: Any) -> tuple[list[tuple[int, ...]], bool]:
    """What is drawn, and whether by replays."""
    engine = TorchEngine(tiny("llama").to(device), Engine(**settings))
    how = How(8, CONTROLS.end, frozenset())
    asked: list[Any] = [Sampling((SampleRequest((1, 2, n), (n, 5)),), how) for n in range(3)]
    found = [draw.ids for (sampled,) in ask(engine, asked) for draw in sampled.draws]
    return found, engine.passes.replays


def test_what_cannot_be_replayed_is_drawn_without(capsys: pytest.CaptureFixture[str]) -> None:
    modes, real = [0], Passes.whole

    def whole(self: Passes, *given: Any) -> torch.Tensor:
        if modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation\nand more")
        return real(self, *given)

    modes_are = {"set_sync_debug_mode": modes.append, "get_sync_debug_mode": lambda: modes[-1]}
    with patch.dict(CUDA, modes_are), patch.object(Passes, "whole", whole):
        (here, _), (there, replays) = on_both(few_draws)
    assert here == there and not replays and modes == [0, "error", 0]
    why = "draws without CUDA graphs, which this model rules out: called a synchronizing CUDA operation"
    assert capsys.readouterr().err == f"latent-thoughts: {why}\n"


def test_replays_can_be_left_out() -> None:
    (here, _), (there, replays) = on_both(lambda device: few_draws(device, graphs=False))
    assert here == there and not replays


@pytest.mark.gpu
def test_what_waits_for_a_gpu_is_found_before_it_is_recorded() -> None:
    here = torch.ones(3, device="cuda")
    with pytest.raises(replay.Waits, match="synchronizing"), replay.waiting_refused():
        here.sum().item()
    assert torch.cuda.get_sync_debug_mode() == 0
    again, out = replay.record(lambda: here * 2, here.device)
    here.fill_(5)
    again()
    assert out.tolist() == [10, 10, 10]


def test_an_engines_limits_suit_the_device() -> None:
    """A llama of 2 layers with 2 key-value heads of width 8: 64 numbers a position."""
    settings = Engine(sequences=7, pass_tokens=99)
    here, there = on_both(lambda device: TorchEngine(tiny("llama").bfloat16().to(device), settings).limits)
    assert here == Limits(7, 65536, 99, 2**26)
    assert there == Limits(7, 2**33 // 4 // (2 * 64), 99, 2**28)


@pytest.mark.parametrize("kind", FAMILIES)
def test_scores_behind_contexts_in_half_precision_are_near(kind: str, gpu: Any) -> None:
    """By flash attention, with the keys of contexts and prompts before the new ones, where attention is plain."""
    rng = np.random.default_rng(0)
    contexts = [tuple(rng.integers(0, VOCABULARY, n).tolist()) for n in (0, 3, 9, 17, 30)]
    thoughts = tuple(tuple(rng.integers(0, VOCABULARY, n).tolist()) for n in (2, 5, 11))
    asked: list[Any] = [Scoring((ScoreRequest(contexts[-1][:20], thoughts),)) for _ in contexts]
    real, longer = KERNELS["torch_attn::_varlen_attn"], []

    def work(device: str) -> Any:
        engine = TorchEngine(tiny(kind).bfloat16().to(device))
        return np.concatenate([x.ravel() for (row,) in ask(engine, asked, contexts) for x in row])

    def counted(q: Any, k: Any, *given: Any) -> Any:
        longer.append(len(k) > len(q))
        return real(q, k, *given)

    with patch.dict(KERNELS, {"torch_attn::_varlen_attn": counted}):
        here, there = on_both(work, gpu)
    assert gpu is not pretended_gpu or any(longer) == (kind not in ("gemma2", "gpt_oss"))
    assert np.abs(here - there).mean() < 0.1


@pytest.mark.parametrize("behind", [Behind(), Behind(0.5, 2.0)], ids=["plain", "capped"])
@pytest.mark.parametrize("count", [1, 32, 100, 300])
def test_losses_of_even_sizes_are_those_of_the_sizes_as_they_are(count: int, behind: Behind, gpu: Any) -> None:
    """37 tokens of a vocabulary, positions of any number: what is added changes nothing."""
    g = torch.Generator().manual_seed(0)
    given = [torch.randn(*shape, generator=g) for shape in ((count, 8), (37, 8), (37,))]
    targets = torch.randint(37, (count,), generator=g)

    def work(device: str) -> list[float]:
        leaves = [x.detach().to(device).requires_grad_() for x in given]
        total, losses = losses_by_blocks(*leaves, targets.to(device), 32, behind)
        total.backward()
        return torch.cat([x.detach().cpu().flatten() for x in (losses, *(leaf.grad for leaf in leaves))]).tolist()

    here, there = on_both(work, gpu)
    assert here == pytest.approx(there, abs=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_training_takes_the_same_steps(kind: str, optimizer: str, gpu: Any) -> None:
    config = Train(sequence_length=48, rows=4, micro_rows=2, optimizer=optimizer, ema=0.9)  # pyright: ignore

    def work(device: str) -> Any:
        return train(tiny(kind).to(device), config, half=False)

    here, there = on_both(work, gpu)
    assert here == pytest.approx(there, rel=1e-4 if optimizer == "adamw" else 0.02)  # a GPU's Muon is in bfloat16


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 12, 5)])
def test_matrices_are_orthogonalised_in_half_precision(shape: tuple[int, int, int]) -> None:
    stack = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    here, there = on_both(lambda device: orthogonalise(stack.to(device)).cpu())
    assert there.dtype == torch.float32 and torch.equal(there, there.bfloat16().float())
    assert not torch.equal(here, there) and torch.allclose(here, there, atol=0.05)


@pytest.mark.parametrize("kind", FAMILIES)
def test_training_in_half_precision_is_near(kind: str, gpu: Any) -> None:
    """By flash attention where the model's attention is plain."""
    config, real, lengths = Train(sequence_length=48, rows=4), KERNELS["torch_attn::_varlen_attn"], []

    def work(device: str) -> Any:
        return train(tiny(kind).to(device), config, half=True)

    def counted(q: Any, *given: Any) -> Any:
        lengths.append(len(q))
        return real(q, *given)

    with patch.dict(KERNELS, {"torch_attn::_varlen_attn": counted}):
        here, there = on_both(work, gpu)
    assert here == pytest.approx(there, rel=0.02)
    assert gpu is not pretended_gpu or bool(lengths) == (kind not in ("gemma2", "gpt_oss"))


def test_layers_are_one_graph_with_their_attention_whatever_the_documents() -> None:
    """What a GPU's compiler sees, with flash attention's kernels of a CPU's making."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    varlen._varlen_attn.register_kernel("cpu", KERNELS["torch_attn::_varlen_attn"])
    varlen._varlen_attn_backward.register_kernel("cpu", KERNELS["torch_attn::_varlen_attn_backward"])
    model, cpu = tiny("llama").train(), torch.device("cpu")
    attention.install(model)

    def step(sizes: list[int]) -> list[torch.Tensor]:
        place = torch.cat([torch.arange(n) for n in sizes])[None]
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            branches = FlashDocuments(sizes, cpu)
            out = model.base_model(input_ids=place % 17, position_ids=place, use_cache=False, branches=branches)
        out.last_hidden_state.float().square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    rows = [[40, 7, 17], [32, 32, 32], [9, 3, 50, 2, 64], [5] * 13 + [31], [96]]
    torch._dynamo.reset()
    counters.clear()
    with patch.object(documents, "rows_fit", lambda q, v, rule: rule.plain):
        expected = [step(sizes) for sizes in rows]
        with patch.object(torch, "compile", functools.partial(torch.compile, backend="aot_eager")):
            layers.compile_blocks(model)
        found = [step(sizes) for sizes in rows]
    assert (counters["stats"]["unique_graphs"], dict(counters["graph_break"])) == (1, {})
    for a, b in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
        assert (a - b).norm() <= 0.05 * b.norm()


@pytest.mark.gpu
def test_compiled_layers_take_the_same_steps_on_a_gpu() -> None:
    config = Train(sequence_length=48, rows=4, micro_rows=2)
    plain, compiled = (train(tiny("llama").cuda(), config, True, compiled) for compiled in (False, True))
    assert plain == pytest.approx(compiled, rel=0.02)


def train(model: Any, config: Train, half: bool, compiled: bool = False) -> list[float]:
    """Losses and gradient norms of three steps."""
    batches = Batches(corpus(), CONTROLS, config, 0)
    objective = Objective(model, 5 * VOCABULARY)
    objective.compile_blocks(model.device) if compiled else lean.install(model, 0)
    trainer = Trainer(objective, optimizers(model, config), batches, config, 0, half)
    stream = loader.load(batches, Ranks())
    steps = [trainer.step(next(stream), 1.0) for _ in range(3)]
    return [step[name] for step in steps for name in ("loss", "norm")]


def corpus() -> Corpus:
    rng = np.random.default_rng(0)
    documents = []
    for n, (text, thought) in enumerate([(5, 3), (9, 4), (1, 2), (4, 0), (12, 2), (3, 3), (7, 1), (20, 9)]):
        x, z = (tuple(rng.integers(0, 17, size).tolist()) for size in (text, thought))
        documents.append(ThoughtDocument(str(n), (Chunk(str(n), 0, 0, "", x),), ((z,),), (True,), "test"))
    return Corpus.of(documents)


def behind_paths(device: str, width: int, window: int | None) -> torch.Tensor:
    """What spans behind paths of spans get of two layers."""
    made, rule = torch.Generator().manual_seed(0), Rule(0.25, window, None, None)
    held = [[torch.randn(2, 2, n, width, generator=made).bfloat16() for _ in "kv"] for n in (7, 1, 12)]
    new = [torch.randn(h, 15, width, generator=made).bfloat16() for h in (4, 2, 2)]
    a, b, c = (Span(*(x.to(device) for x in kv)) for kv in held)
    extend = Extend([(a,), (), (a, b), (c,)], [5, 3, 6, 1], [True, False, False, False], torch.device(device))
    found = [extend.attend(layer, *(x.to(device) for x in new), rule) for layer in (0, 1)]
    return torch.stack(found).float().cpu()


@pytest.mark.parametrize("window", [None, 4, 9])
@pytest.mark.parametrize("width", [8, 20], ids=["flash", "no flash"])
def test_spans_behind_paths_see_what_they_do_on_a_cpu(width: int, window: int | None, gpu: Any) -> None:
    here, there = on_both(lambda device: behind_paths(device, width, window), gpu)
    assert torch.allclose(here, there, atol=0.02)


@pytest.mark.parametrize("width", [16, 20])
def test_documents_are_trained_with_heads_of_any_width(width: int, gpu: Any) -> None:
    """Flash attention over rows takes multiples of 8 alone."""
    sizes, rule = [9, 30, 5], Rule(0.25, None, None, None)

    def work(device: str) -> Any:
        torch.manual_seed(0)
        row = [torch.randn(h, sum(sizes), width).bfloat16().to(device) for h in (4, 2, 2)]
        documents = FlashDocuments if device == "cuda" else Documents
        return documents(sizes, torch.device(device)).attend(0, *row, rule).float().cpu()

    here, there = on_both(work, gpu)
    assert torch.allclose(here, there, atol=0.02)


def test_values_narrower_than_keys_do_without_flash_attention() -> None:
    """DeepSeek's; the kernel knows one width."""
    sizes, rule = [9, 30, 5], Rule(0.25, None, None, None)

    def work(device: str) -> Any:
        torch.manual_seed(0)
        q, k, v = (torch.randn(h, sum(sizes), d).bfloat16().to(device) for h, d in ((4, 16), (2, 16), (2, 8)))
        return Documents(sizes, torch.device(device)).attend(0, q, k, v, rule).float().cpu()

    here, there = on_both(work)
    assert torch.allclose(here, there, atol=0.02)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_is_the_same(dtype: str, small: dict[str, Any], tmp_path: Path) -> None:
    """Warm start, with checkpoints, and an E-step, by the stages."""
    small["model"]["dtype"] = dtype
    small["train"] |= {"optimizer": "adamw", "ema": 0.9, "dropout": 0.0}

    def work(device: str) -> Any:
        run = Run(resolve(small), tmp_path / device)
        assert models.device_of(run.recipe.model).type == device
        run.prepare()
        run.synthesize()
        trained = run.train_warm_start().counts
        sampled = Loop(run, "em", run.recipe.sample, run.folder).sample(1).counts
        return trained, sampled

    (trained, sampled), (trained_there, sampled_there) = on_both(work)
    assert trained["tokens"] == trained_there["tokens"]
    assert sampled["draws"] == sampled_there["draws"]
    # in half precision a training goes its own way after some steps
    assert sampled["raw_logprob"] == pytest.approx(
        sampled_there["raw_logprob"], rel=1e-4 if dtype == "float32" else 0.2
    )


def test_an_e_step_finds_the_memory_of_the_training_before_it(small: dict[str, Any], tmp_path: Path) -> None:
    """Else its workers, or vLLM, would not: torch keeps a GPU's memory, and cycles of objects keep a model's."""
    given_back: list[int] = []
    chosen: list[torch.device] = []
    small["model"] |= {"device": "cuda:0"}
    with pretended_gpu():
        run = Run(resolve(small), tmp_path)
        run.prepare()
        run.synthesize()
        with patch.object(torch.cuda, "set_device", chosen.append):
            run.train_warm_start()
        assert chosen == [torch.device("cuda", 0)]  # the model's, whose seed and memory torch is then asked for
        alive = lambda: sum(type(x) in (Trainer, Objective) for x in gc.get_objects())  # noqa: E731
        with patch.object(torch.cuda, "empty_cache", lambda: given_back.append(alive())):
            Loop(run, "em", run.recipe.sample, tmp_path).sample(1)
    assert given_back == [0]


def test_a_whole_pass_is_compiled_for_cpus_alone() -> None:
    with pretended_gpu(), pytest.raises(UserError, match=r"train\.compile: whole is for CPUs: take blocks"):
        Whole(tiny("llama").to("cuda"), 48, 2**20)


def test_more_processes_than_gpus_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    told = pytest.raises(UserError, match="more processes than there are GPUs: give --nproc-per-node 1")
    with pretended_gpu(), told, parallel.ranks():
        pass


def test_a_gpu_holds_more_logits() -> None:
    devices = [torch.device(kind) for kind in ("cpu", "cuda")]
    assert [logits_held(Train(), device) for device in devices] == [2**24, 2**27]
    assert [logits_held(Train(logits=5), device) for device in devices] == [5, 5]


def test_a_training_without_memory_names_what_to_set(small: dict[str, Any], tmp_path: Path) -> None:
    small["train"]["rows"] = 6
    run = Run(resolve(small), tmp_path)
    run.prepare()
    run.synthesize()
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.")
    told = pytest.raises(UserError, match=r"train\.micro_rows \(now 6\) or set train\.checkpoint_activations")
    with patch.object(Trainer, "_backward", side_effect=error), told:
        run.train_warm_start()


def test_vllm_finds_the_memory_of_what_came_before_it_and_spawns_its_processes() -> None:
    """Engines and teachers: a fork of a process that has asked for GPUs could use none."""
    given_back: list[None] = []
    with pretended_gpu(), patch.dict(os.environ), patch.dict(sys.modules, {"vllm": ModuleType("vllm")}):
        os.environ.pop("VLLM_WORKER_MULTIPROC_METHOD", None)
        with patch.object(torch.cuda, "empty_cache", lambda: given_back.append(None)):
            imported("engine.kind: vllm")
        assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"  # as the user wants it
        imported("engine.kind: vllm")
        assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "fork"
    assert given_back == [None]
