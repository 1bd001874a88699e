"""Infer the thoughts behind a few texts with a model you have, and look at their weights.

python examples/weigh_thoughts.py FOLDER

On a first call it trains a small model on the built-in castle (a few seconds on a CPU) in FOLDER/run.
"""

import sys
from pathlib import Path

from latent_thoughts import Chunking, RunFolder, Sample, Thinker, load_corpus, load_recipe, recipe_path, weigh

folder = Path(sys.argv[1])
world = ["data.world={documents: 20, teacher_documents: 150}", "data.world.seed=0"]
run = RunFolder(load_recipe(recipe_path("castle.yaml"), [*world, "train.steps=100", "train.rows=4"]), folder / "run")
run.prepare()
run.synthesize()
run.train()

# A corpus is anything that yields documents: files, a Hugging Face dataset, a built-in world.
texts = [d for d in load_corpus("world:castle", world={"documents": 20}) if d.id.startswith("corpus")][:5]

# Eight thoughts a text, half of them from a model that has read it (posterior), half from one that has not (prior).
thinker = Thinker(run.model(), seed=1)
settings = Sample(k=8, max_thought_tokens=10, max_tokens=64)
for posterior in thinker.infer(texts, settings, Chunking(mode="pieces", thoughts="last")):
    draws = posterior.draws
    weights = weigh(
        log_p=[d.log_prior + d.log_x for d in draws],
        log_q=[d.log_q for d in draws],
        finished=[d.draw.finished for d in draws],
    )
    assert (weights.log_weights == posterior.log_weights).all()
    print(thinker.text(posterior.context_ids), "...", posterior.chunk.text)
    for n in sorted(range(len(draws)), key=lambda n: -weights.shares[n]):
        kept = "kept" if n == posterior.chosen else ""
        said = thinker.text(draws[n].draw.ids)
        print(f"  {weights.shares[n]:5.1%}  gain {posterior.gains[n]:+6.2f}  {draws[n].proposal:9}  {kept:4}  {said}")
    print(f"  log p(x | c) {posterior.raw_logprob:.2f}, bound {weights.bound:.2f} nats", end="")
    print(f", effective sample size {weights.effective_sample_size:.1f} of {len(draws)}")
