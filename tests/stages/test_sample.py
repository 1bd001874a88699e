"""The E-step over shards."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from latent_thoughts import model as models
from latent_thoughts import weights
from latent_thoughts.config import Sample, resolve
from latent_thoughts.data import contamination, records
from latent_thoughts.data.corpus import Source
from latent_thoughts.data.tokenizer import Codec, add_control_tokens
from latent_thoughts.em import Run
from latent_thoughts.engines.joint import Seeds
from latent_thoughts.engines.torch_engine import TorchEngine
from latent_thoughts.stages import sample as sampling
from latent_thoughts.store import read_manifest
from latent_thoughts.types import Chunk, ThoughtDocument, UserError
from tests.conftest import tiny
from tests.data.test_tokenizer import byte_level


@pytest.fixture
def warm(tmp_path: Path, small: dict[str, Any]) -> Run:
    small["train"]["steps"] = 15
    run = Run(resolve(small), tmp_path / "run")
    run.prepare()
    run.synthesize()
    run.train_warm_start()
    return run


def sample(run: Run, folder: Path, iteration: int = 1, **settings: Any):
    config = run.recipe.sample.model_copy(update=settings)
    return sampling.sample(run.recipe, config, run.warm_start / "train", run.prepared, folder, iteration)


def posteriors(folder: Path) -> list[dict[str, Any]]:
    names = [n for n in read_manifest(folder).shards if n.startswith("posterior-")]
    return [row for name in names for row in pq.read_table(folder / name).to_pylist()]


def test_an_interrupted_stage_keeps_its_shards(warm: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample(warm, tmp_path / "whole")
    write, written = sampling._write_shard, []

    def twice(*args: Any) -> Any:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(args[1])
        return write(*args)

    monkeypatch.setattr(sampling, "_write_shard", twice)
    with pytest.raises(KeyboardInterrupt):
        sample(warm, tmp_path / "parts")
    monkeypatch.undo()
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "parts").glob("corpus-*.parquet")}
    assert len(kept) == 2
    sample(warm, tmp_path / "parts")
    assert all((tmp_path / "parts" / name).stat().st_mtime_ns == at for name, at in kept.items())
    assert posteriors(tmp_path / "parts") == posteriors(tmp_path / "whole")


def test_batch_size_changes_nothing(warm: Run, tmp_path: Path) -> None:
    sample(warm, tmp_path / "a")
    engine = warm.recipe.engine.model_copy(update={"sequences": 5, "tokens": 300, "pass_tokens": 60})
    sample(replace(warm, recipe=warm.recipe.model_copy(update={"engine": engine})), tmp_path / "b")
    for a, b in zip(posteriors(tmp_path / "a"), posteriors(tmp_path / "b"), strict=True):
        assert [d["ids"] for d in a["draws"]] == [d["ids"] for d in b["draws"]]
        assert a["chosen"] == b["chosen"]
        assert a["log_weights"] == pytest.approx(b["log_weights"], abs=1e-4)


def test_counts_equal_the_shards(warm: Run, tmp_path: Path) -> None:
    counts, rows = sample(warm, tmp_path / "s").counts, posteriors(tmp_path / "s")
    assert counts["chunks"] == len(rows) == 40
    assert counts["draws"] == sum(len(r["draws"]) for r in rows) == 160
    assert counts["unfinished"] == sum(not d["finished"] for r in rows for d in r["draws"])
    assert counts["mean_ess"] == pytest.approx(np.mean([r["ess"] for r in rows]))
    assert counts["accepted_share"] == np.mean([r["chosen"] >= 0 for r in rows])
    for r in rows:
        log_w = np.array(r["log_weights"])
        assert r["ess"] == pytest.approx(weights.effective_sample_size(log_w))
        for d, w, gain in zip(r["draws"], r["log_weights"], r["gains"], strict=True):
            if d["finished"]:
                assert w == pytest.approx(d["log_prior"] + d["log_x"] - d["log_q"])
                assert gain == pytest.approx(d["log_x"] - r["raw_logprob"])
            else:
                assert w == -np.inf


def test_the_number_of_draws_follows_its_schedule(warm: Run, tmp_path: Path) -> None:
    assert warm.recipe.em.iterations == 2
    counts = [sample(warm, tmp_path / str(n), n, k=3, last_k=5).counts["draws"] for n in (1, 2)]
    assert counts == [40 * 3, 40 * 5]


@pytest.mark.parametrize("rejected", ["skip", "raw"])
def test_rejected_chunks(warm: Run, tmp_path: Path, rejected: str) -> None:
    counts = sample(warm, tmp_path / rejected, rejected=rejected).counts
    rows = posteriors(tmp_path / rejected)
    accepted = {r["doc_id"] for r in rows if r["chosen"] >= 0}
    documents = [d for _, part in records.shards(tmp_path / rejected, "corpus") for d in part]
    assert 0 < len(accepted) < 40
    assert {d.id for d in documents if d.thoughts[1]} == accepted
    assert len(documents) == (len(accepted) if rejected == "skip" else 40)
    assert counts["documents"] == 40 and counts["left_out_share"] == (40 - len(documents)) / 40
    assert all(d.thoughts[0] == () for d in documents)


def test_thoughts_that_repeat_an_evaluation_set(warm: Run, tmp_path: Path) -> None:
    sample(warm, tmp_path / "all")
    kept = [(r["doc_id"], r["draws"][r["chosen"]]["text"]) for r in posteriors(tmp_path / "all") if r["chosen"] >= 0]
    words = {doc_id: contamination.words(text) for doc_id, text in kept}
    known = next(found[:3] for found in words.values() if len(found) > 3)
    repeating = {doc_id for doc_id, found in words.items() if known in [found[n : n + 3] for n in range(len(found))]}
    assert 0 < len(repeating) < len(kept)
    (tmp_path / "exam.jsonl").write_text(json.dumps({"answer": " ".join(known)}) + "\n" + '{"answer": "a b c"}\n')
    for remove in (False, True):
        settings = {"sets": {"exam": str(tmp_path / "exam.jsonl")}, "n": 3, "remove": remove}
        recipe = resolve({**warm.recipe.model_dump(), "contamination": settings})
        for _ in range(2):  # the second time from the shards
            folder = tmp_path / f"remove_{remove}"
            counts = sample(replace(warm, recipe=recipe), folder).counts
            assert counts["contaminated_thoughts_exam"] == len(repeating)
            assert counts["evaluation_rows_repeated_exam"] == 1
            (folder / "manifest.json").unlink()
        sample(replace(warm, recipe=recipe), folder)
        left = {r["doc_id"] for r in posteriors(folder) if r["chosen"] >= 0}
        assert left == {doc_id for doc_id, _ in kept} - (repeating if remove else set())
        thoughtful = {d.id for _, part in records.shards(folder, "corpus") for d in part if any(d.thoughts)}
        assert thoughtful == left


def test_gains_are_measured_against_a_raw_model_of_its_own(warm: Run, tmp_path: Path) -> None:
    raw, config = tmp_path / "raw" / "train", warm.recipe.train.model_copy(update={"layout": "raw"})
    warm.train(config, [Source(warm.prepared, "corpus")], raw.parent)
    sample(warm, tmp_path / "own")
    sample(warm, tmp_path / "against", raw_model=str(raw))
    model = models.load(raw / "model", warm.recipe.model).eval()
    for own, row in zip(posteriors(tmp_path / "own"), posteriors(tmp_path / "against"), strict=True):
        assert own["draws"] == row["draws"] and own["log_weights"] == row["log_weights"]
        expected = logprob(model, tuple(row["context_ids"]), tuple(row["chunk_ids"]))
        assert row["raw_logprob"] == pytest.approx(expected, abs=1e-4) != own["raw_logprob"]
        for d, gain in zip(row["draws"], row["gains"], strict=True):
            assert not d["finished"] or gain == pytest.approx(d["log_x"] - expected, abs=1e-4)
        assert row["chosen"] < 0 or row["gains"][row["chosen"]] > 0


def test_a_raw_model_with_another_tokenizer_is_refused(warm: Run, tmp_path: Path, small: dict[str, Any]) -> None:
    small["data"] |= {"source": "world:stories"}
    other = Run(resolve(small, ["train.steps=1"]), tmp_path / "other")
    other.prepare()
    other.synthesize()
    other.train_warm_start()
    with pytest.raises(UserError, match="another tokenizer"):
        sample(warm, tmp_path / "s", raw_model=str(other.warm_start / "train"))


def test_engines_that_disagree_stop_the_run(warm: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"differ by .* more than sample.max_gap"):
        sample(warm, tmp_path / "s", max_gap=-1.0)


def test_another_limit_of_the_gap_keeps_what_was_drawn(warm: Run, tmp_path: Path) -> None:
    first = sample(warm, tmp_path / "s", max_gap=1.0)
    assert sample(warm, tmp_path / "s", max_gap=2.0) == first and not list(tmp_path.glob("s.*"))


def test_the_model_is_part_of_the_key(warm: Run, tmp_path: Path) -> None:
    first = sample(warm, tmp_path / "s")
    other = Run(resolve({**warm.recipe.model_dump(), "seed": 1}), warm.folder)
    assert sample(other, tmp_path / "t").key != first.key


def logprob(model: Any, prefix: tuple[int, ...], ids: tuple[int, ...]) -> float:
    """log p(ids | prefix) from one forward pass of transformers over the whole sequence."""
    with torch.no_grad():
        rows = torch.log_softmax(model(torch.tensor([[*prefix, *ids]]).to(model.device)).logits[0].double(), -1)
    return float(sum(rows[len(prefix) + n - 1, i] for n, i in enumerate(ids)))


@pytest.mark.parametrize("temperature", [1.0, 1.5])
@pytest.mark.parametrize("preset", ["paper", "default"])
def test_what_was_drawn_is_what_is_scored_and_kept(preset: str, temperature: float) -> None:
    """Ids that no tokenizer would choose for their text, behind contexts of every length, cut and whole."""
    tokenizer = byte_level()
    controls = add_control_tokens(tokenizer)
    model, drawing, codec = tiny("llama", len(tokenizer)), tiny("llama", len(tokenizer)), Codec(tokenizer)
    for m in (model, drawing):
        m.get_output_embeddings().weight.data[controls.end] *= 3  # so that thoughts end now and then
    words = ["the", " cat sat", " on the mat.", " It", " rained."]
    documents = []
    for n in range(12):
        ids = [tuple(codec.encode(word)) for word in words[: 1 + n % 5]]
        chunks = tuple(Chunk(f"d{n}", m, 0, codec.decode(i), i) for m, i in enumerate(ids))
        documents.append(ThoughtDocument(f"d{n}", chunks, ((),) * len(ids), (True,) * len(ids), "raw"))
    config = Sample(preset=preset, k=24, accept="all", keep=2, max_thought_tokens=12, max_tokens=27)
    worker = sampling.Worker(config, Seeds(0, 1), controls, codec, temperature)
    found = worker.posteriors(TorchEngine(drawing), documents, lambda *_: None)
    S, E, P, Q = controls.start, controls.end, controls.prior, controls.posterior
    strange, cut, checked = 0, 0, 0
    for p in found:
        c, x = p.context_ids, p.chunk.ids
        cut += c[0] != controls.bos
        assert p.raw_logprob == pytest.approx(logprob(model, (*c, S, E), x), abs=1e-3)
        for d in p.draws:
            z = d.draw.ids
            if d.draw.finished:
                strange += tuple(codec.encode(codec.decode(z))) != z
                checked += 1
                assert d.log_posterior == pytest.approx(logprob(model, (*c, S, E, *x, S, Q), (*z, E)), abs=1e-3)
                assert d.log_prior == pytest.approx(logprob(model, (*c, S, P), (*z, E)), abs=1e-3)
                assert d.log_x == pytest.approx(logprob(model, (*c, S, P, *z, E), x), abs=1e-3)
    assert strange > 10 and cut > 3 and checked > 20  # the test is not empty
    kept = {(d.id, m): z for d in worker.choose(documents, found) for m, z in enumerate(d.thoughts)}
    for p in found:
        if thoughts := kept.get((p.chunk.doc_id, p.chunk.index)):
            assert thoughts == tuple(p.draws[n].draw.ids for n in p.kept)
            row = records.posterior_row(p, codec.decode)
            assert tuple(row["draws"][row["chosen"]]["ids"]) == thoughts[0]
    assert any(tuple(codec.encode(codec.decode(z))) != z for thoughts in kept.values() for z in thoughts)
    assert any(len(thoughts) == 2 for thoughts in kept.values())
