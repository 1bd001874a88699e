"""One EM iteration, stage by stage, on the built-in castle: what `latent-thoughts em` does, in a program of yours.

python examples/em_by_hand.py FOLDER

Small enough for seconds on a CPU: too few steps to solve the castle (`latent-thoughts demo` does).
"""

import sys

from latent_thoughts import RunFolder, Thinker, load_recipe, recipe_path

recipe = load_recipe(
    recipe_path("castle.yaml"),
    [
        "train.steps=60",
        "em.iterations=1",
        "sample.k=4",
        "data.world={documents: 80, teacher_documents: 60, held_out_share: 0.1}",
        "evaluate.documents=40",
    ],
)
run = RunFolder(recipe, sys.argv[1])

run.prepare()  # documents in chunks, and the base model with its four new tokens
run.synthesize()  # the warm start's thoughts: here those that come with the data
run.train()  # M_0, the warm start

health = run.sample(1).counts  # E-step: M_0 thinks about the corpus
print(f"accepted {health['accepted_share']:.0%} of {health['chunks']:.0f} chunks")
print(f"effective sample size {health['mean_ess']:.1f} of {recipe.sample.k} draws")

run.train(1)  # M-step: M_1, from the base model on documents with their thoughts

for iteration in (0, 1):
    row = run.evaluate(iteration)
    bounds = ", ".join(f"L_{k} {value:.3f}" for k, value in row["bound_per_token"].items())
    print(f"M_{iteration}: accuracy {row['accuracy']:.0%} of {row['accuracy_n']}, {bounds} nats a token")

codec = Thinker(run.model(1))
document = next(run.documents("corpus", iteration=1))
print("kept, the thought in brackets: ", end="")
for chunk, thoughts in zip(document.chunks, document.thoughts, strict=True):
    print("".join(f"[{codec.text(ids).strip()}] " for ids in thoughts) + chunk.text, end="")
print(f"\nmodels: {run.model(0)} and {run.model(1)}, plain Hugging Face folders (in `model`)")
