"""Export: a run's thoughts or paraphrases as JSONL, Parquet, or a Hugging Face dataset with its card.

latent-thoughts export RUN TARGET --iteration 0
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from latent_thoughts import __version__
from latent_thoughts import model as models
from latent_thoughts.config import Dumper, Recipe, load_recipe
from latent_thoughts.data import interchange, records
from latent_thoughts.data.tokenizer import Codec
from latent_thoughts.places import place, remote
from latent_thoughts.provenance import MADE_WITH, own_recipe, unplaced
from latent_thoughts.store import atomic, read_json, read_manifest, read_table
from latent_thoughts.types import Manifest, UserError

# Where things are asked is nobody else's business; where they lie, `unplaced` takes out.
_ADDRESSES: Any = {"executor": {"address"}, "synthesize": {"store": True, "teacher": {"base_url", "key_env"}}}
# Settings that name files, however they look; and regular expressions, which may look like such names.
_PLACES, _PATTERNS = {"source", "held_out_source", "prompts", "sets", "raw_model"}, {"answer", "extract"}
DOCUMENTED = ("prepare", "synthesize", "sample")  # stages whose shards are documents
FORMATS = ("jsonl", "parquet", "dataset", "hub")
_OF_A_DATASET = re.compile(r"[\w-]+\.arrow|dataset_info\.json|state\.json|README\.md|listing\.json")


def kind_of(target: str) -> str:
    """The format that a file's name tells."""
    return "parquet" if target.lower().endswith(".parquet") else "jsonl"


def export(
    folder: Path, run: Path, target: str, kind: str, license: str, private: bool = True, held_out: bool = False
) -> int:
    """Writes all documents of a completed synthesize or sample stage of a run; how many. Of prepare, those to train on,
    or instead of them those that are `held_out`.

    `kind`: "jsonl" or "parquet" (a file), "dataset" (a folder for `datasets.load_from_disk`, with its card) or "hub"
    (`push_to_hub`, with its card). Raises UserError for a stage that is not complete or has no such documents, and for
    a folder at `target` that would be lost.
    """
    if kind not in FORMATS:
        raise UserError(f"there is no format {kind!r} (known: {', '.join(FORMATS)})")
    path = None if kind == "hub" else _free(target, kind)
    if (manifest := read_manifest(folder)).stage not in DOCUMENTED:
        raise UserError(f"{folder} holds no documents: name a stage that does ({', '.join(DOCUMENTED)})")
    shards = _shards(folder, run, manifest, held_out)
    codec = Codec(models.load_tokenizer(run / "base" / "model")[0])
    rows = _rows(folder, manifest, shards, codec)
    if path is not None and kind != "dataset":
        return (_jsonl if kind == "jsonl" else _parquet)(rows, path)
    text = card(folder, manifest, _recipe(run, folder), license)
    return _dataset(rows, text, path or target, private)


def _recipe(run: Path, folder: Path) -> Recipe:
    """What a stage was made with, which is not always what the rest of the run was."""
    run, folder = run.resolve(), folder.resolve()
    own = own_recipe(run, folder) if run in folder.parents else run
    return load_recipe(own if own.is_file() else run / "recipe.yaml")


def _free(target: str, kind: str) -> Path:
    """Where to write. Raises UserError for a folder, unless a dataset is to take the place of an earlier one."""
    path = place(target)
    path = path if remote(path) else path.resolve()  # `.` has no name of its own
    if not path.exists():
        return path
    if path.is_dir() != (kind == "dataset"):
        raise UserError(f"{target} is a {'folder: name a file in it' if path.is_dir() else 'file: name a folder'}")
    if path.is_file():
        return path
    names = sorted(p.name for p in path.iterdir())
    others = [name for name in names if not _OF_A_DATASET.fullmatch(name)]
    if names and (others or "dataset_info.json" not in names):
        what = f"holds {others[0]}" if others else "is no dataset"
        raise UserError(f"{target} {what}, and would be lost: name a folder that is not there yet, or a dataset's")
    return path


def _shards(folder: Path, run: Path, manifest: Manifest, held_out: bool) -> list[str]:
    """Those with the documents that are wanted. Raises UserError for none: nothing would take the place of a file."""
    names = [name for name in manifest.shards if not name.startswith("posterior-")]
    if found := [name for name in names if name.startswith("held_out-") == held_out]:
        return found
    if not held_out:
        raise UserError(f"{folder} holds no documents")
    where = "data.held_out" if manifest.stage == "prepare" else f"they are prepare's: --stage {run / 'prepare'}"
    raise UserError(f"{folder} holds no held-out documents ({where})")


def _rows(folder: Path, manifest: Manifest, shards: list[str], codec: Codec) -> Iterator[dict[str, Any]]:
    for name in shards:
        for row in records.read_rows(folder, manifest, name):
            yield interchange.row(records.document_of(row), codec)


def _jsonl(rows: Iterator[dict[str, Any]], path: Path) -> int:
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        return sum(1 for row in rows if file.write(json.dumps(row, ensure_ascii=False) + "\n"))


def _parquet(rows: Iterator[dict[str, Any]], path: Path) -> int:
    count = 0
    with atomic(path) as temporary, pq.ParquetWriter(temporary, interchange.SCHEMA, compression="zstd") as writer:
        while part := list(islice(rows, 1000)):
            writer.write_table(pa.Table.from_pylist(part, schema=interchange.SCHEMA))
            count += len(part)
    return count


def _dataset(rows: Iterator[dict[str, Any]], text: str, target: Path | str, private: bool) -> int:
    """With `text` as its card. `target` is a folder, or a name on the hub."""
    try:
        import datasets
    except ImportError:
        raise UserError("writing datasets needs an extra: pip install 'latent-thoughts[datasets]'") from None
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "rows.parquet"
        _parquet(rows, file)
        made = datasets.Dataset.from_parquet(str(file), cache_dir=scratch, keep_in_memory=False)
        assert isinstance(made, datasets.Dataset)
        if isinstance(target, str):
            from huggingface_hub import DatasetCard

            made.push_to_hub(target, private=private)
            DatasetCard(text).push_to_hub(target)
        else:
            with atomic(target) as temporary:
                made.save_to_disk(str(temporary))
                (temporary / "README.md").write_text(text, encoding="utf-8")
        return len(made)


def card(folder: Path, manifest: Manifest, recipe: Recipe, license: str) -> str:
    """A dataset card: what the documents were made from, by whom, asked how, and how many. Texts of others (prompts)
    stand in indented blocks, where nothing in them is read as Markdown or HTML."""
    head = {"license": license, "tags": ["latent-thoughts", "synthetic"], "task_categories": ["text-generation"]}
    title, who, latent = _made(_source(folder, manifest), recipe)
    prompts = read_json(folder / "prompts.json") if (folder / "prompts.json").exists() else []
    # Lines that name malformed rows quote them, and their files.
    counts = {name: count for name, count in manifest.counts.items() if not name.startswith("malformed: ")}
    sections = {*MADE_WITH["prepare"]} if manifest.stage == "prepare" else None
    settings = _unplaced(recipe.model_dump(mode="json", include=sections, exclude=_ADDRESSES))
    return "\n".join(
        [
            "---",
            _yaml(head).rstrip(),
            "---",
            "",
            f"# {title}, by latent-thoughts {__version__}",
            "",
            f"Stage {manifest.stage}, key `{manifest.key[:16]}`; {who}. The license is that of the texts; whoever",
            "exported them named it.",
            "",
            "A row is a document: `text`, and `chunks` of `suffix` (a piece of the text; joined they equal it) and",
            f"`latent` ({latent}); `source` says where it comes from.",
            "",
            "## Counts",
            "",
            *_indented(_yaml(counts)),
            "",
            *(line for prompt in prompts for line in _prompt(prompt)),
            "## Recipe",
            "",
            *_indented(_yaml(settings)),
            "",
        ]
    )


def _source(folder: Path, manifest: Manifest) -> str:
    """Where a stage's documents come from: "raw" where none has anything that it did not come with."""
    names = [name for name in manifest.shards if not name.startswith("posterior-")]
    found = (source for name in names for source in read_table(folder / name, ["source"])["source"].to_pylist())
    return next((source for source in found if source != "raw"), "raw")


def _made(source: str, recipe: Recipe) -> tuple[str, str, str]:
    """A card's title, who made what is in the documents, and what `latent` is."""
    teacher = recipe.synthesize.teacher
    by = (
        f"by `{unplaced(str(teacher.model))}` ({teacher.kind})" if teacher.kind != "data" else "that came with the data"
    )
    if source == "raw":
        return "Documents", "the documents are as they were read", "null"
    if source.startswith("wrap_"):
        return "Paraphrased documents", f"the texts are paraphrases ({source}) {by}", "null"
    who = {
        "oracle": "the thoughts came with the data",
        "em": "the thoughts were inferred by the model itself (the E-step)",
    }.get(source, f"the thoughts were written {by}")
    return "Documents with latent thoughts", who, "the thought before it, null where there is none"


def _unplaced(value: Any, is_place: bool = False) -> Any:
    """Settings without the places that they name."""
    if isinstance(value, dict):
        return {
            name: part if name in _PATTERNS and not is_place else _unplaced(part, is_place or name in _PLACES)
            for name, part in value.items()
        }
    if isinstance(value, list):
        return [_unplaced(part, is_place) for part in value]
    return unplaced(value, is_place) if isinstance(value, str) else value


def _prompt(prompt: dict[str, Any]) -> list[str]:
    shown = {"messages": prompt["messages"]}
    title = f"## Prompt `{prompt['name']}`, version {prompt['version']}, hash `{prompt['hash'][:16]}`"
    return [title, "", *_indented(_yaml(shown)), ""]


def _yaml(value: Any) -> str:
    return yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def _indented(text: str) -> list[str]:
    return ["    " + line for line in text.splitlines()]
