"""A corpus of your own with a few thoughts of your own: from a JSONL file to a model that thinks before it answers.

python examples/own_corpus.py FOLDER

The rows here are sums, so that it runs in seconds on a CPU; the columns and the recipe are what you would write.
"""

import json
import sys
from pathlib import Path

import yaml

from latent_thoughts import RunFolder, Thinker, load_recipe
from latent_thoughts.data.tokenizer import word_tokenizer

folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)

# 1. The corpus: a JSON object a line, with any columns. `why` is a thought that somebody wrote down.
rows = [
    {"question": f"{a} plus {b} plus {c} ? ", "why": f"{a} and {b} make {a + b} ", "answer": f"so {a + b + c} ."}
    for a in range(6)
    for b in range(6)
    for c in range(6)
]
(folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

# 2. A tokenizer, since this model is made from scratch. With a pretrained model leave it and `tokenizer` out.
words = [*(str(n) for n in range(16)), "plus", "?", "so", "and", "make"]
word_tokenizer([*(word + " " for word in words), "."]).save_pretrained(folder / "tokenizer")

# 3. The recipe: how rows become documents, which of them keep their thoughts, and how long to train.
shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
recipe = {
    "threads": 1,
    "data": {
        "source": str(folder / "sums.jsonl"),
        "pieces": ["{question}", "{answer}"],
        "thought": "{why}",
        "warm_start": 0.5,
        "held_out": 0.1,
    },
    "chunking": {"mode": "pieces", "thoughts": "last"},
    "model": {"base": {"max_position_embeddings": 64, **shape}, "tokenizer": f"{folder}/tokenizer"},
    "train": {"steps": 150, "rows": 4, "loss_on": "targets", "sequence_length": 64, "lr": 0.01, "optimizer": "muon"},
    "sample": {"k": 4, "max_thought_tokens": 8, "max_tokens": 64},
    "evaluate": {"answer": "so (\\d+)", "answer_tokens": 4},
}
(folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))

# 4. Train on the rows with thoughts, and ask.
run = RunFolder(load_recipe(folder / "recipe.yaml"), folder / "run")
run.prepare()
run.synthesize()
run.train()
thought, answer = Thinker(run.model()).answer("2 plus 3 plus 4 ? ", max_thought_tokens=8, max_answer_tokens=4)
print(f"2 plus 3 plus 4 ?  [{thought.strip()}]  {answer}")
print(f"held out: {run.evaluate()['accuracy']:.0%} right")
