"""synthesize: a teacher's thoughts for document shards.

    latent-thoughts synthesize recipe.yaml --out RUN

Method `oracle`: the thoughts that come with the data (a built-in world's, or `data.thought`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from latent_thoughts import model as models
from latent_thoughts.data.records import DOCUMENTS, document_row, oracle, shards
from latent_thoughts.data.tokenizer import Codec
from latent_thoughts.runlog import track
from latent_thoughts.store import Stage, read_manifest, stage_key
from latent_thoughts.types import Manifest, ThoughtDocument, UserError


def synthesize_oracle(prepared: Path, base: Path, splits: tuple[str, ...], folder: Path) -> Manifest:
    """Thought shards for the given splits. Raises UserError for documents that came without thoughts."""
    inputs = {"prepare": read_manifest(prepared)}
    stage = Stage(folder, "synthesize", stage_key("synthesize", ["oracle", splits], inputs))
    if (manifest := stage.manifest) is not None:
        return manifest
    codec = Codec(models.load_tokenizer(base / "model")[0])
    names: list[str] = []
    documents = thoughts = tokens = 0
    with track("synthesize", float("inf"), "documents") as advance:
        for split in splits:
            for name, part in shards(prepared, split):
                rows = [with_oracle(document, codec) for document in part]
                stage.write(name, [document_row(row) for row in rows], DOCUMENTS, {})
                names.append(name)
                documents += len(rows)
                found = [z for row in rows for kept in row.thoughts for z in kept]
                thoughts, tokens = thoughts + len(found), tokens + sum(map(len, found))
                advance(len(rows))
    if not thoughts:
        raise UserError("no document of the warm start has a thought: set data.thought, and data.warm_start above 0")
    return stage.close(names, {"documents": documents, "thoughts": thoughts, "thought_tokens": tokens})


def with_oracle(document: ThoughtDocument, codec: Codec) -> ThoughtDocument:
    known = oracle(document)
    thoughts = tuple(
        (tuple(codec.encode(known[n])),) if n in known and target else () for n, target in enumerate(document.target)
    )
    return replace(document, thoughts=thoughts, source="oracle")
