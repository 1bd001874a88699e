"""Checkpoints read without running what is in them.

torch.distributed.checkpoint pickles a checkpoint's description, and values that are no tensors, and reads them as any
pickle: whoever can write into a run folder could have code run when it is resumed. Here the description may name
torch's own classes alone, and values are read by torch's `weights_only` reader (as tensors always were).
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

from latent_thoughts.places import plain
from latent_thoughts.types import UserError

_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "float32", "float64", "float16", "bfloat16", "int64", "int32", "int8", "uint8", "bool"},
    "pathlib": {"Path", "PosixPath", "WindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "WindowsPath"},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


class Reader(FileSystemReader):
    """Raises UserError where a checkpoint's description is not one."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        rank = kwargs.get("rank")
        path = Path(self.path) / (".metadata" if rank is None else f"__{rank}.metadata")
        try:
            found = _Unpickler(io.BytesIO(path.read_bytes())).load()
        except FileNotFoundError:
            raise UserError(f"checkpoint {path.parent} lacks {path.name}: remove it") from None
        except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError, IndexError) as error:
            raise UserError(f"checkpoint {path.parent} is not to be trusted ({error}): remove it") from None
        if not isinstance(found, Metadata):
            raise UserError(f"checkpoint {path.parent} is not to be trusted (no description): remove it")
        if found.storage_meta is None:
            found.storage_meta = StorageMeta()
        found.storage_meta.load_id = self.load_id
        files = {info.relative_path for info in (found.storage_data or {}).values()}
        if outside := [name for name in files if not plain(name)]:
            raise UserError(f"checkpoint {path.parent} is not to be trusted (it names {outside[0]}): remove it")
        return found


class Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        try:
            plain = torch.load(value, weights_only=True)
        except pickle.UnpicklingError as error:
            what = str(error).strip().splitlines()[0]
            raise UserError(
                f"a checkpoint is not to be trusted ({read_item.dest_index.fqn}: {what}): remove it"
            ) from None
        buffer = io.BytesIO()
        torch.save(plain, buffer)  # what it has become holds nothing that could run
        buffer.seek(0)
        super().load_bytes(read_item, buffer)
