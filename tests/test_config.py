"""The recipe: what is refused, what is filled in, and that it survives being saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_thoughts.config import PRESETS, Recipe, Sample, Train, load_recipe, resolve
from latent_thoughts.config.base import parse
from latent_thoughts.experiment import Experiment
from latent_thoughts.types import UserError


def refusal(values: dict[str, Any], *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        resolve(values, list(overrides))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("values", "unknown", "nearest"),
    [
        ({"trian": {"lr": 1}}, "trian", "train"),
        ({"train": {"lrr": 1}}, "train.lrr", "train.lr"),
        ({"data": {"world": {"teacher_docs": 1}}}, "data.world.teacher_docs", "data.world.teacher_documents"),
        ({"sample": {"max_though_tokens": 1}}, "sample.max_though_tokens", "sample.max_thought_tokens"),
        ({"em": {"warm_start": {"lrr": 1}}}, "lrr", "lr"),
        ({"em": {"raw": {"dropuot": 1}}}, "dropuot", "dropout"),
        ({"lr": 1}, "lr", "train.lr"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(
    values: dict[str, Any], unknown: str, nearest: str
) -> None:
    assert f"unknown key {unknown} (did you mean {nearest}?)" in refusal(values)


def test_an_m_step_of_nothing_is_refused() -> None:
    told = "an M-step needs documents: give warm_start, thoughts or raw a weight above 0"
    assert told in refusal({"em": {"mix": {"warm_start": 0, "thoughts": 0}}})


def test_an_unknown_key_is_refused_even_when_empty() -> None:
    assert "unknown key trian" in refusal({"trian": None})


def test_an_unknown_override_is_refused_like_a_key() -> None:
    assert "unknown key train.lrr (did you mean train.lr?)" in refusal({}, "train.lrr=1")


def test_a_section_among_others_of_its_kind_has_known_keys_too() -> None:
    values = {"about": "", "recipes": {}, "claims": {"7": {"first": "em", "secnd": "raw"}}}
    with pytest.raises(UserError, match=r"unknown key claims\.7\.secnd \(did you mean claims\.7\.second\?\)"):
        parse(Experiment, values, "here")
    assert "evaluate.tasks.0.form?" in refusal({"evaluate": {"tasks": [{"name": "gsm8k", "frm": "cot"}]}})


def test_all_unknown_keys_are_named_at_once() -> None:
    message = refusal({"train": {"lrr": 1}, "engine": {"tokns": 1}})
    assert "train.lr?" in message and "engine.tokens?" in message


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"train": {"lr": "fast"}}, "train.lr"),
        ({"train": {"rows": 0}}, "train.rows"),
        ({"train": {"lr": 0}}, "train.lr"),
        ({"train": {"lr": float("nan")}}, "train.lr"),
        ({"train": {"muon_lr": -0.1}}, "train.muon_lr"),
        ({"train": {"betas": [0.9, 1.0]}}, "train.betas"),
        ({"train": {"weight_decay": -0.1}}, "train.weight_decay"),
        ({"train": {"clip": -1}}, "train.clip"),
        ({"train": {"warmup_steps": -10}}, "train.warmup_steps"),
        ({"train": {"epochs": float("inf")}}, "train.epochs"),
        ({"seed": -1}, "seed"),
        ({"data": {"held_out": 1.5}}, "data.held_out"),
        ({"data": {"extract": {"answer": "("}}}, "data.extract.answer"),
        ({"evaluate": {"answer": "(("}}, "evaluate.answer"),
        ({"data": {"thought": "{solution}"}}, "data.pieces"),
        ({"sample": 5}, "sample"),
        ({"sample": {"preset": ["paper"]}}, "sample.preset"),
        ({"sample": {"preset": "papers"}}, "sample.preset"),
        ({"sample": {"temperature": [1.0, 0.0]}}, "sample.temperature"),
        ({"evaluate": {"bound_temperature": float("inf")}}, "evaluate.bound_temperature"),
        ({"em": {"baselines": ["rawtokens"]}}, "em.baselines"),
    ],
)
def test_a_bad_value_is_refused_by_name(values: dict[str, Any], name: str) -> None:
    assert name in refusal(values)


def test_overrides_are_yaml_and_win_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("train: {lr: 1.0e-4, rows: 2}\n")
    overrides = ["train.lr=3e-4", "data.world.documents=7", "em.baselines=[oracle]", "model.tokenizer=null"]
    recipe = load_recipe(tmp_path / "r.yaml", overrides)
    assert (recipe.train.lr, recipe.train.rows) == (3e-4, 2)
    assert recipe.data.world.documents == 7
    assert recipe.em.baselines == ["oracle"]
    assert recipe.model.tokenizer is None


@pytest.mark.parametrize(
    "text",
    ["train: {lr: 1, lr: 2}", "train:\n  lr: 1\ndata:\n  limit: 3\ntrain:\n  rows: 4\n", "data: {'id': a, id: b}"],
)
def test_a_key_that_stands_twice_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=r"r\.yaml is not valid YAML: (lr|train|id) stands here twice .*line \d"):
        load_recipe(tmp_path / "r.yaml")


def test_what_is_merged_in_may_be_set_anew(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "em: {warm_start: &a {lr: 1.0, rows: 2}, raw: {<<: *a, lr: 3.0}, variants: {b: {train: {<<: *a, lr: 4.0}}}}"
    )
    em = load_recipe(tmp_path / "r.yaml").em
    assert em.raw == {"rows": 2, "lr": 3.0} and em.variants["b"]["train"] == {"rows": 2, "lr": 4.0}


@pytest.mark.parametrize("override", ["evaluate.answer=#### (-?\\d+)", "data.source=my #1 file.jsonl"])
def test_a_text_that_yaml_would_cut_is_refused_with_the_way_to_write_it(override: str) -> None:
    name, _, text = override.partition("=")
    message = refusal({}, override)
    assert "ends at its #" in message and message.endswith(f"write {name}='{text}'")
    recipe = resolve({}, [f"{name}='{text}'"])
    assert text in (recipe.evaluate.answer, recipe.data.source)
    assert resolve({}, ["data.source=a#b"]).data.source == "a#b"


def test_a_template_without_quotes_is_told_how_to_be_written() -> None:
    assert "in quotes" in refusal({}, "data.text={question}")
    assert resolve({}, ["data.text='{question}'"]).data.text == "{question}"


@pytest.mark.parametrize(
    ("values", "name"),
    [({"seed": True}, "seed"), ({"sample": {"k": True}}, "sample: k"), ({"data": {"limit": False}}, "data: limit"),
     ({"train": {"lr": float("nan")}}, "train.lr"), ({"sample": {"margin": float("inf")}}, "sample.margin")],
)  # fmt: skip
def test_what_is_no_number_is_none(values: dict[str, Any], name: str) -> None:
    assert name in refusal(values)


@pytest.mark.parametrize("section", ["model: {base: &a {x: [*a]}}", "synthesize: {teacher: {parameters: &a {x: *a}}}"])
def test_what_holds_itself_is_refused(tmp_path: Path, section: str) -> None:
    (tmp_path / "r.yaml").write_text(section)
    with pytest.raises(UserError, match=r"r\.yaml is nested without end"):
        load_recipe(tmp_path / "r.yaml")


def test_a_recipe_that_names_one_thing_billions_of_times(tmp_path: Path) -> None:
    levels = "".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]\n" for n in range(1, 30))
    (tmp_path / "r.yaml").write_text(f"l0: &l0 [x]\n{levels}")
    with pytest.raises(UserError, match="unknown key l0"):
        load_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize("override", ["train.lr", "train.lr=[1,", "seed.x=1"])
def test_a_malformed_override_is_named(override: str) -> None:
    assert override.partition("=")[0].partition(".")[0] in refusal({"seed": 3}, override)


def test_numbers_may_be_written_as_in_python(tmp_path: Path) -> None:
    """A model's config is passed on as it is read, so that text for a number would be refused far from here."""
    (tmp_path / "r.yaml").write_text("model: {base: {rms_norm_eps: 1e-5, rope_theta: 5E+5, name: '1e-5'}}\n")
    recipe = load_recipe(tmp_path / "r.yaml", ["em.warm_start.lr=3e-4"])
    assert recipe.model.base == {"rms_norm_eps": 1e-5, "rope_theta": 5e5, "name": "1e-5"}
    assert recipe.em.warm_start == {"lr": 3e-4}


def test_an_empty_section_is_one_that_is_not_set(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("train:\n#  lr: 1\nseed: 3\n")
    assert load_recipe(tmp_path / "r.yaml") == Recipe(seed=3)
    assert load_recipe(tmp_path / "r.yaml", ["train.rows=3"]).train.rows == 3


def test_an_empty_file_is_the_default_recipe(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("")
    assert load_recipe(tmp_path / "r.yaml") == Recipe()


HOSTILE = [
    b"train: {lr: 1", b"\xff\xfe", b"- a\n- b\n", b"just words",
    b"seed: 2024-02-31", b"seed: " + b"9" * 5000, b"a: &a [*a]", b"train: &t {x: *t}", b"[" * 3000, b"a: \x00",
    b"!!python/object/apply:os.system ['true']", b"{1: 2}", b"? [a, b]\n: c", b"train: !!set {a, b}", b"--- a\n--- b",
]  # fmt: skip


@pytest.mark.parametrize("content", HOSTILE)
def test_a_file_that_is_no_recipe_is_named_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"r\.yaml") as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_or_a_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml does not exist"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_recipe(tmp_path)


@pytest.mark.parametrize("name", ["paper", "default"])
def test_a_preset_fills_only_what_is_not_set(name: str) -> None:
    preset = resolve({"sample": {"preset": name}}).sample
    assert preset.model_dump(include=set(PRESETS[name])) == {
        **PRESETS[name],
        "temperature": tuple(PRESETS[name]["temperature"]),
    }
    changed = resolve({"sample": {"preset": name}}, ["sample.k=3", "sample.accept=gain"]).sample
    assert (changed.k, changed.accept) == (3, "gain")
    assert changed.posterior_share == preset.posterior_share
    assert changed.margin == Sample().margin


def test_the_default_preset_is_what_a_bare_recipe_has() -> None:
    assert resolve({}).sample == resolve({"sample": {"preset": "default"}}).sample


def test_temperature_goes_linearly_from_first_to_last() -> None:
    sample = Sample(temperature=(2.0, 1.0))
    assert [sample.temperature_at(n, 5) for n in range(1, 6)] == pytest.approx([2.0, 1.75, 1.5, 1.25, 1.0])
    assert sample.temperature_at(1, 1) == 2.0


def test_the_number_of_draws_goes_from_first_to_last() -> None:
    sample = Sample(k=8, last_k=24)
    assert [sample.k_at(n, 4) for n in range(1, 5)] == [8, 13, 19, 24]
    assert [Sample(k=8).k_at(n, 4) for n in range(1, 5)] == [8, 8, 8, 8]
    assert sample.k_at(1, 1) == 8


def test_one_budget_at_most() -> None:
    assert Train().budget == ("epochs", 1.0)
    assert Train(tokens=500).budget == ("tokens", 500.0)
    message = refusal({"train": {"steps": 3, "epochs": 1}})
    assert "steps and epochs" in message and "train" in message
    assert Train(steps=3).with_budget("raw_tokens", 9).budget == ("raw_tokens", 9.0)


def test_the_warm_start_takes_trains_settings_and_its_own() -> None:
    recipe = resolve({"train": {"lr": 0.5, "steps": 7}, "em": {"warm_start": {"lr": 0.25}}})
    assert (recipe.warm_start_train.lr, recipe.warm_start_train.budget) == (0.25, ("steps", 7.0))


def test_raw_baselines_take_trains_settings_and_their_own() -> None:
    recipe = resolve({"train": {"lr": 0.5, "raw_share": 0.3}, "em": {"raw": {"dropout": 0.25}}})
    raw = recipe.raw_train
    assert (raw.lr, raw.dropout, raw.layout, raw.raw_share) == (0.5, 0.25, "raw", 0.0)
    assert recipe.train.dropout == recipe.warm_start_train.dropout == 0.0


def test_the_warm_starts_budget_replaces_trains() -> None:
    recipe = resolve({"train": {"steps": 7}, "em": {"warm_start": {"epochs": 2}}})
    assert recipe.warm_start_train.budget == ("epochs", 2.0)
    assert "steps and epochs" in refusal({"em": {"warm_start": {"steps": 1, "epochs": 2}}})


def test_overrides_leave_the_given_values_alone() -> None:
    values = {"train": {"lr": 0.5}}
    assert resolve(values, ["train.lr=0.25"]).train.lr == 0.25
    assert values == {"train": {"lr": 0.5}}


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers(), inner, max_size=3),
    max_leaves=6,
)
SECTIONS = sorted(Recipe.model_fields)
FIELDS = sorted(
    {
        f"{name}.{field}"
        for name in SECTIONS
        for field in getattr(Recipe.model_fields[name].annotation, "model_fields", ())
    }
)


def resolved(values: Any, *overrides: str) -> None:
    """A recipe that can be saved and is read as the same, or a refusal in one line."""
    try:
        recipe = resolve(values, list(overrides))
    except UserError as error:
        assert str(error)
        return
    assert resolve(recipe.model_dump(mode="json")) == recipe or "nan" in str(recipe)


@settings(max_examples=150)
@given(st.dictionaries(st.sampled_from(SECTIONS) | st.text(max_size=5), VALUES, max_size=3))
def test_any_values_are_a_recipe_or_refused(values: dict[str, Any]) -> None:
    resolved(values)


@settings(max_examples=150)
@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=2))
def test_any_value_of_a_setting_is_taken_or_refused(values: dict[str, Any]) -> None:
    nested: dict[str, Any] = {}
    for name, value in values.items():
        section, _, field = name.partition(".")
        nested.setdefault(section, {})[field] = value
    resolved(nested)


@settings(max_examples=150)
@given(st.lists(st.builds("{}={}".format, st.sampled_from(FIELDS) | st.text(), st.text()) | st.text(), max_size=3))
def test_any_override_is_taken_or_refused(overrides: list[str]) -> None:
    resolved({}, *overrides)


@settings(max_examples=100)
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_a_recipe_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("recipe") / "r.yaml"
    path.write_bytes(content)
    try:
        load_recipe(path)
    except UserError as error:
        assert "r.yaml" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["em.samples=[4,4]"], "em.samples: 4 stands there twice"),
        (["em.baselines=[raw,raw]"], "em.baselines: raw stands there twice"),
        (["evaluate.bound=[1,4,1]"], "evaluate.bound: 1 stands there twice"),
        (["em.samples=[4]", "sample.k=4", "sample.last_k=8"], "leave 4 out"),
        (["sample.max_tokens=512"], "lower max_thought_tokens, which is 1024"),
        (["engine.kind=vllm", "engine.scorer=vllm"], "vLLM cannot score tempered draws"),
        (["evaluate.tasks=[{name: gsm8k}, {name: gsm8k, limit: 5}]"], "results would lie in one folder"),
        (["evaluate.fine_tune={train: {lrate: 1}}"], "unknown key lrate"),
        (["evaluate.fine_tune={ask: {form: direct, budgets: [1]}}"], "budgets are of thoughts"),
        (["model.base={a: 2020-01-01}"], "put it in quotes"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(overrides: list[str], said: str) -> None:
    assert said in refusal({}, *overrides)


def test_vllm_may_score_where_nothing_tempered_is_drawn() -> None:
    resolve({}, ["engine.kind=vllm", "engine.scorer=vllm", "em.iterations=0"])


def test_a_preset_that_is_named_sets_its_values_anew() -> None:
    """A resolved recipe, as a run leaves it, names every value."""
    whole = resolve({}).model_dump()
    assert resolve(whole, ["sample.preset=paper"]).sample == Sample(preset="paper")
    assert resolve(whole, ["sample.k=8", "sample.preset=paper"]).sample == Sample(preset="paper", k=8)
    assert resolve(whole, ["sample.k=8"]).sample == Sample(k=8)
