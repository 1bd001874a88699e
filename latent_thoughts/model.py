"""Loading base models, the four new embeddings, and export as plain Hugging Face folders."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from latent_thoughts.bases import pickled, told, where_of, without_weights
from latent_thoughts.config import Model
from latent_thoughts.data import worlds
from latent_thoughts.data.tokenizer import Controls, add_control_tokens, controls_of, word_tokenizer
from latent_thoughts.store import atomic, check_files
from latent_thoughts.transfer import local
from latent_thoughts.types import UserError

# On a CPU, oneDNN keeps a kernel of about a megabyte for each of the last 1,024 shapes, and the passes of an E-step
# hardly ever have the same number of rows: memory would grow for hours. It reads these when it is first used.
for _limit in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_limit, "256")


def set_up_torch(threads: int | None) -> None:
    """Threads of this process, and no progress bars of transformers beside our own; downloads keep theirs."""
    from huggingface_hub import constants
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()  # and those of the hub, on which a large model is minutes
    if not constants.HF_HUB_DISABLE_PROGRESS_BARS:
        enable_progress_bars()
    if threads:
        torch.set_num_threads(threads)


def device_of(config: Model) -> torch.device:
    """Raises UserError for a device that torch does not know, and for a GPU where there is none."""
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(config.device)
    except RuntimeError:
        raise UserError(f"model.device: torch knows no device {config.device}: set auto, cpu or cuda") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"model.device: {config.device}, but torch finds {torch.cuda.device_count()} GPUs: set auto")
    return device


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, measured now, in a second or less (more where a CPU has no such products)."""
    from torch.utils import benchmark

    size = 8192 if device.type == "cuda" else 1536  # of about 1,024 oneDNN has one thread do all the work (docs/log.md)
    a = torch.randn(size, size, device=device).to(dtype)
    given = {"linear": nn.functional.linear, "a": a}
    product = benchmark.Timer("linear(a, a)", globals=given, num_threads=torch.get_num_threads())
    return 2 * size**3 / min(product.blocked_autorange(min_run_time=0.2).times)


def load_base(config: Model, source: str, seed: int, world_seed: int) -> tuple[Any, Any, Controls]:
    """The base model with the four tokens added: (model, tokenizer, controls).

    New embeddings of a pretrained model, input and output, start at the mean of the old ones, as in the paper, or are
    drawn around it (`model.new_tokens`); a model from a config starts at its own random initialisation. What is drawn
    depends on `seed`. Raises UserError for a model that cannot be loaded or has no tokenizer.
    """
    tokenizer = base_tokenizer(config, source, world_seed)
    before = set(tokenizer.get_vocab().values())
    controls = add_control_tokens(tokenizer)
    ids = set(tokenizer.get_vocab().values())
    wanted = max(ids) + 1  # which may be more than there are tokens
    torch.manual_seed(seed)
    if isinstance(config.base, dict):
        return _from_config(config, wanted), tokenizer, controls
    model = _load_pretrained(config)
    rows = model.get_input_embeddings().weight.shape[0]
    if wanted > rows:
        model.resize_token_embeddings(wanted, mean_resizing=False)
    if new := ids - before:
        spread = APART if config.new_tokens == "apart" else 0.0
        _set_new(model, sorted(new), sorted(before & set(range(rows))), spread)
    return model, tokenizer, controls


APART = 0.3  # of the old embeddings' standard deviation, at which new ones are drawn around their mean (docs/log.md)


def _set_new(model: Any, new: list[int], old: list[int], spread: float) -> None:
    """Embeddings of new tokens, input and output, and their part of a head's bias. Four that are the same to begin with
    are told apart, as input and as output, only after many steps."""
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            if (bias := getattr(layer, "bias", None)) is not None:
                bias[new] = bias[old].float().mean().to(bias.dtype)
            if layer is not None:
                known = layer.weight[old].float()
                drawn = spread * known.std(0, correction=0) * torch.randn(len(new), known.shape[1])
                layer.weight[new] = (known.mean(0) + drawn).to(layer.weight.dtype)


def _from_config(config: Model, vocabulary: int) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    assert isinstance(config.base, dict)
    settings = {"model_type": "llama", "bos_token_id": None, "eos_token_id": None, **config.base}
    try:
        hf_config = AutoConfig.for_model(**{**settings, "vocab_size": vocabulary})
        _write_from_left_to_right(hf_config)
        return AutoModelForCausalLM.from_config(
            hf_config, dtype=getattr(torch, config.dtype), attn_implementation=config.attention
        )
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UserError(f"model.base: {' '.join(str(error).split())}") from None


def outline(config: Model, vocabulary: int) -> Any:
    """The base model without its weights, on torch's meta device: what it is made of, in no time and no memory.

    `vocabulary` counts where the base is a config that gives none. Raises UserError for a model that is not at hand.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        if isinstance(config.base, dict):
            return _from_config(config, config.base.get("vocab_size", vocabulary))
        try:
            found = AutoConfig.from_pretrained(
                **where_of(config.base, without_weights), trust_remote_code=config.trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise told(config.base, error, f"cannot load the config of {config.base}", "; set plan.model") from None
        return AutoModelForCausalLM.from_config(found)


def _load_pretrained(config: Model) -> Any:
    from transformers import AutoModelForCausalLM

    where: dict[str, Any] = {"use_safetensors": None if config.allow_pickle else True, **where_of(config.base)}
    if "gguf_file" in where:
        del where["use_safetensors"]
    try:
        model = AutoModelForCausalLM.from_pretrained(
            dtype=getattr(torch, config.dtype),
            attn_implementation=config.attention,
            trust_remote_code=config.trust_remote_code,
            **where,
        )
    except (OSError, ValueError) as error:
        raise told(config.base, error, f"cannot load model {config.base}", pickled(config, where, error)) from None
    _write_from_left_to_right(model.config)
    return _plain(model) if "gguf_file" in where else model


def _write_from_left_to_right(hf_config: Any) -> None:
    """BERT and its like look both ways unless their configuration says that they decode; what is exported says it."""
    if getattr(hf_config, "is_decoder", None) is False and not hf_config.is_encoder_decoder:
        hf_config.is_decoder = True


def _plain(model: Any) -> Any:
    """The dequantised weights of a GGUF file in a model of the plain class, which can be exported."""
    from transformers import AutoModelForCausalLM

    settings = model.config.to_dict()
    settings.pop("quantization_config", None)
    plain = AutoModelForCausalLM.from_config(type(model.config).from_dict(settings), dtype=model.dtype)
    plain.load_state_dict(model.state_dict())
    return plain


def load_plain(config: Model) -> tuple[Any, Any]:
    """(model, tokenizer) of a pretrained model as it is, without thought tokens, on its device.

    Raises UserError where it cannot be loaded.
    """
    return _load_pretrained(config).to(device_of(config)).eval(), base_tokenizer(config, "", 0)


def base_tokenizer(config: Model, source: str, seed: int) -> Any:
    """The base model's tokenizer, without the four tokens. Raises UserError where there is none."""
    from transformers import AutoTokenizer

    if config.tokenizer == "world":
        return word_tokenizer(worlds.make(source.removeprefix("world:"), seed).words())
    if config.tokenizer is None and isinstance(config.base, dict):
        raise UserError("model.base is a config, which brings no tokenizer: set model.tokenizer")
    where = where_of(config.tokenizer or config.base, without_weights)
    try:
        return AutoTokenizer.from_pretrained(**where, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, TypeError, KeyError) as error:
        name = config.tokenizer or config.base
        raise told(name, error, f"cannot load a tokenizer from {name}") from None


def save(model: Any, tokenizer: Any, folder: Path, card: str = "") -> None:
    """Exports a Hugging Face folder (safetensors, tokenizer and model card), complete or absent."""
    with atomic(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        if card:
            (temporary / "README.md").write_text(card, encoding="utf-8")


def load(folder: Path, config: Model, dtype: str | None = None, check: bool = True) -> Any:
    """A model that `save` wrote, on the configured device. Raises UserError for a stage's model that is damaged, which
    one of several processes need `check`."""
    from transformers import AutoModelForCausalLM

    if check:
        check_files(folder.parent)
    model: Any = AutoModelForCausalLM.from_pretrained(
        local(folder),
        dtype=getattr(torch, dtype or config.dtype),
        attn_implementation=config.attention,
        use_safetensors=True,
        trust_remote_code=config.trust_remote_code,
    )
    return model.to(device_of(config))


def load_tokenizer(folder: Path) -> tuple[Any, Controls]:
    """The tokenizer of a folder that `save` wrote. Raises UserError where there is none, or no thought tokens."""
    tokenizer = plain_tokenizer(folder)
    return tokenizer, controls_of(tokenizer)


def config_of(folder: Path) -> Any:
    """The configuration of any model's folder. Raises UserError where it is missing or needs code of its own."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(local(folder, without_weights), trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise told(folder, error, f"cannot load a configuration from {folder}") from None


def plain_tokenizer(folder: Path) -> Any:
    """The tokenizer of any model's folder. Raises UserError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(local(folder, without_weights), trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise told(folder, error, f"cannot load a tokenizer from {folder}") from None


def idle_weights(model: Any) -> float:
    """Those of experts, which transformers keeps in one tensor, that a token is not sent to."""
    taken = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
    experts = [p for name, p in model.named_parameters() if ".experts." in name and p.ndim == 3]
    return sum(p.numel() * (1 - taken / len(p)) for p in experts) if taken else 0.0


def check_positions(model: Any, tokens: int, setting: str) -> None:
    """Raises UserError where `tokens` of a sequence, which `setting` asks for, are more than the model's table of
    positions has rows (GPT-2, OPT, GPT-J). Without a table, positions go on for as long as one likes."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or tokens
    weights = [*model.named_parameters(), *model.named_buffers()]
    tables = [w for name, w in weights if re.search(r"wpe|pos", name) and w.ndim == 2 and len(w) >= most]
    if tables and tokens > most:
        raise UserError(f"{setting} = {tokens} is more than the model's {most} positions: keep to {most} or less")
