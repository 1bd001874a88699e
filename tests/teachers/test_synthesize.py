"""The stage around a teacher: policies, prices and the cap, the question before, paraphrases, contamination."""

from __future__ import annotations

import io
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from loopback import Body, Loopback, completion, plain_reply
from test_openai_api import thoughts

from latent_thoughts import cli
from latent_thoughts.approve import approval
from latent_thoughts.config import Chunking, resolve
from latent_thoughts.data import records
from latent_thoughts.data.tokenizer import Codec, word_tokenizer
from latent_thoughts.em import em
from latent_thoughts.stages.synthesize.asking import Estimate
from latent_thoughts.stages.synthesize.writing import taker
from latent_thoughts.teachers import checks
from latent_thoughts.teachers.base import Completion
from latent_thoughts.types import UserError


def refusing(share_of: str) -> Any:
    """Replies that decline where the text says so, the first time it is asked or always."""
    asked: Counter[str] = Counter()

    def reply(body: Body) -> Body:
        question = body["messages"][-1]["content"]
        asked[question] += 1
        declines = "Sentence 1 of" in question.split("Passage:\n")[-1] and (
            share_of == "always" or asked[question] == 1
        )
        return completion("I'm sorry, but I can't help with that.") if declines else plain_reply(body)

    return reply


@pytest.mark.parametrize(
    ("share_of", "overrides", "kept", "raw", "documents", "asked"),
    [
        ("once", [], 60, 0, 20, 80),  # a second attempt
        ("always", [], 40, 20, 20, 100),  # three attempts, and then the text alone
        ("always", ["synthesize.exhausted=drop"], 40, 0, 0, 100),
        ("always", ["synthesize.checks.refusal=raw"], 40, 20, 20, 60),
        ("always", ["synthesize.checks.refusal=drop"], 40, 0, 0, 60),
        ("always", ["synthesize.checks.refusal=accept"], 60, 0, 20, 60),
    ],
)
def test_policies(
    make: Any, share_of: str, overrides: list[str], kept: int, raw: int, documents: int, asked: int
) -> None:
    with Loopback(refusing(share_of)) as server:
        run = make(server.url, *overrides)
        counts = run.synthesize().counts
    assert (counts["kept"], counts["raw"], counts["documents"], len(server.asked)) == (kept, raw, documents, asked)
    assert counts["fault_refusal"] == asked - 40 - (20 if share_of == "once" else 0)
    assert counts["fault_empty"] == counts["fault_loop"] == 0  # those that did not happen are counted too
    if documents:
        found = thoughts(run)
        assert len(found) == kept and all(found.values())  # no empty thought stands in for one that is missing
        assert sum("sorry" in text for text in found.values()) == (20 if "accept" in str(overrides) else 0)


@pytest.mark.parametrize("method", ["latent_thoughts", "wrap_cot"])
def test_a_reply_that_no_tokenizer_takes_is_asked_again(make: Any, method: str) -> None:
    """A lone surrogate, which JSON can hold; it neither ends the run nor stays in the way of the next one."""
    asked: Counter[str] = Counter()

    def reply(body: Body) -> Body:
        question = body["messages"][-1]["content"]
        asked[question] += 1
        broken = "of document 7 " in question.split("assage:\n")[-1] and asked[question] == 1
        return completion("It follows \ud83d from what is known.") if broken else plain_reply(body)

    overrides = [f"synthesize.method={method}", "synthesize.checks.copied=accept"]
    with Loopback(reply) as server:
        counts = make(server.url, *overrides).synthesize().counts
    units, broken = (60, 3) if method == "latent_thoughts" else (20, 1)
    assert (counts["kept"], counts["fault_unencodable"], len(server.asked)) == (units, broken, units + broken)


def test_nobody_is_asked_about_white_space(make: Any, values: dict[str, Any]) -> None:
    rows = [{"a": f"Row {n}. ", "b": " \n"} for n in range(3)]
    Path(values["data"]["source"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    values["data"] |= {"pieces": ["{a}", "{b}"]}
    values["chunking"] = {"mode": "pieces"}
    with Loopback() as server:
        counts = make(server.url).synthesize().counts
    assert len(server.asked) == counts["kept"] == 3
    assert all("Passage:\nRow" in question for question in server.asked)


def test_a_word_that_the_tokenizer_does_not_know_is_a_fault(tmp_path: Path) -> None:
    codec = Codec(word_tokenizer(["it ", "follows "]))
    for method in ("latent_thoughts", "wrap_cot"):
        takes = taker(method, Chunking(), codec)
        assert takes("it follows ") and not takes("it ensues ") and not takes("\ud83d")
    assert checks.fault(Completion("it ensues ", "length", 1, 1), "", takes) == "unencodable"


@pytest.mark.parametrize("text", ["", "<think>They want to know"])
def test_where_cut_replies_are_accepted_those_without_a_text_are_empty(make: Any, text: str) -> None:
    overrides = ["synthesize.checks={cut: accept, control: accept, empty: raw}", "data.limit=1"]
    replies = iter([completion(text, "length"), *[completion("It follows from", "length")] * 2])
    with Loopback(lambda body: next(replies)) as server:
        counts = make(server.url, *overrides, "synthesize.teacher.concurrency=1").synthesize().counts
    assert (counts["kept"], counts["raw"], counts["fault_cut"], counts["fault_empty"]) == (2, 1, 2, 1)


PRICED = ["synthesize.prices={input: 1000, output: 1000}"]  # a token costs 0.001


def test_shards_are_written_while_others_are_asked_about(make: Any) -> None:
    written: list[list[str]] = []

    def reply(body: Body) -> Body:
        folder = run.synthesized("latent_thoughts")
        written.append(sorted(path.name for path in folder.glob("warm_start-*.parquet")))
        return plain_reply(body)

    with Loopback(reply) as server:
        run = make(server.url, "data.shard_documents=4", "synthesize.teacher.concurrency=2")
        counts = run.synthesize().counts
    assert len(written) == counts["kept"] == 60  # five shards of twelve chunks
    assert written[0] == [] and len(written[-1]) == 4
    assert len(records.documents(run.synthesized("latent_thoughts"), "warm_start")) == 20


def test_the_cap_stops_before_it_is_passed_and_the_next_run_goes_on(make: Any) -> None:
    with Loopback(lambda body: completion(" ".join(f"step{n}" for n in range(30)))) as server:
        with pytest.raises(
            UserError, match=r"cap of 4 is reached: .* raise synthesize.cap .*replies are kept"
        ) as caught:
            make(server.url, *PRICED, "synthesize.cap=4", "synthesize.max_tokens=100").synthesize()
        assert "\n" not in str(caught.value)
        first = len(server.asked)
        assert 0 < first * 0.13 <= 4 < 60 * 0.13
        with pytest.raises(UserError, match="cap of 4"):  # what was spent is not forgotten
            make(server.url, *PRICED, "synthesize.cap=4", "synthesize.max_tokens=100").synthesize()
        assert len(server.asked) == first
        run = make(server.url, *PRICED, "synthesize.cap=200", "synthesize.max_tokens=100")
        counts = run.synthesize().counts
    assert len(server.asked) == len(set(server.asked)) == counts["replies"] == 60
    assert counts["cost"] == pytest.approx(60 * (100 + 30) * 0.001)


@pytest.mark.parametrize("setting", ["failed=raw", "checks.loop=raw", "attempts=2", "temperature=0.3", "max_tokens=90"])
def test_other_settings_have_no_purse_of_their_own(make: Any, setting: str) -> None:
    capped = [*PRICED, "synthesize.cap=4", "synthesize.max_tokens=100"]
    with Loopback(lambda body: completion(" ".join(f"step{n}" for n in range(30)))) as server:
        with pytest.raises(UserError, match="cap of 4 is reached"):
            make(server.url, *capped).synthesize()
        asked = len(server.asked)
        with pytest.raises(UserError, match="cap of 4 is reached"):
            make(server.url, *capped, f"synthesize.{setting}").synthesize()
        assert len(server.asked) == asked > 0
        counts = make(server.url, *PRICED, f"synthesize.{setting}").synthesize().counts
    assert counts["replies"] == len(server.asked)
    assert counts["cost"] == pytest.approx(len(server.asked) * 0.13)


@pytest.mark.parametrize("usage", [None, {"prompt_tokens": -50, "completion_tokens": -5}])
def test_the_cap_holds_where_the_endpoint_does_not_say_what_a_reply_took(make: Any, usage: Any) -> None:
    with Loopback(lambda body: plain_reply(body) | {"usage": usage}) as server:
        with pytest.raises(UserError, match=r"cap of 4 is reached: (3\.|4 is)"):
            make(server.url, *PRICED, "synthesize.cap=4", "synthesize.max_tokens=100").synthesize()
        assert 0 < len(server.asked) * 0.1 < 4  # as if every reply had gone to its limit


def test_the_estimate(make: Any) -> None:
    seen: list[Estimate] = []
    with Loopback() as server:
        run = make(server.url, *PRICED, "synthesize.max_tokens=50", approve=seen.append)
        run.synthesize()
        run.synthesize()  # complete: nothing to agree to
        sent = sum(len(json.dumps(q)) for q in server.asked)
    (one,) = seen
    assert (one.what, one.units, one.open, one.spent, one.local) == ("chunks", 60, 60, 0, False)
    assert one.most_reply_tokens == 60 * 50 and 0 < one.reply_tokens <= one.most_reply_tokens
    assert one.cost == pytest.approx((one.prompt_tokens + one.reply_tokens) / 1000)
    assert one.prompt_tokens > sent / 4  # a byte is a token of this model's


def estimated(cost: float = 1.0, local: bool = False) -> Estimate:
    from latent_thoughts.config.synthesize import Prices

    return Estimate("chunks", "m (openai)", local, 10, 7, 1000, 500, 900, Prices(input=cost, output=cost), 0.5, 3.0)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_question_before_asking(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    approval(False)(estimated())
    monkeypatch.setattr(sys, "stdin", Terminal("n\n"))
    with pytest.raises(UserError, match="nothing was asked"):
        approval(False)(estimated())
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    with pytest.raises(UserError, match="--yes"):
        approval(False)(estimated())
    approval(True)(estimated())
    approval(False)(estimated(local=True))  # costs nothing but time
    said = " ".join(capsys.readouterr().err.split())
    assert "10, 3 of them answered" in said and "about 1,000" in said and "at most 900" in said


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["latent-thoughts", *arguments])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_the_command(
    make: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with Loopback() as server:
        run = make(server.url, *PRICED)
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(run.recipe.model_dump(mode="json")))
        monkeypatch.setattr(sys, "stdin", io.StringIO(""))
        assert call(monkeypatch, "synthesize", str(recipe), "--out", str(run.folder)) == 1
        said = capsys.readouterr().err
        assert "give --yes" in said and "Traceback" not in said and not server.asked
        assert call(monkeypatch, "synthesize", str(recipe), "--out", str(run.folder), "--yes") == 0
        assert "kept" in capsys.readouterr().out and len(server.asked) == 60
        bad = tmp_path / "bad.yaml"
        bad.write_text("name: x\nversion: 1\nmessages: [{role: user, content: '{chunk} {title}'}]\n")
        wrong = ["synthesize", str(recipe), "--out", str(run.folder), "--yes", f"synthesize.prompts=[{bad}]"]
        assert call(monkeypatch, *wrong) == 1
        assert "unknown field {title}" in capsys.readouterr().err.splitlines()[-1]
    assert call(monkeypatch, "prompts", str(tmp_path / "mine")) == 0
    assert len(list((tmp_path / "mine").glob("*.yaml"))) == 6


def test_paraphrases_are_documents_in_one_of_four_styles(make: Any) -> None:
    def reply(body: Body) -> Body:
        style = re.search(r"easy words|experts|encyclopedia|questions and answers", body["messages"][-1]["content"])
        assert style is not None
        return completion(f"Told for {style.group()}. It is short. It ends.")

    with Loopback(reply) as server:
        run = make(server.url, "synthesize.method=wrap_baseline")
        counts = run.synthesize().counts
        again = make(server.url, "synthesize.method=wrap_baseline", folder="again")
        again.synthesize()
    documents = records.documents(run.synthesized("wrap_baseline"), "warm_start")
    originals = {d.id for d in records.documents(run.prepared, "warm_start")}
    assert {d.id for d in documents} == originals and counts["kept"] == len(documents) == 20
    styles = Counter(d.meta["prompt"] for d in documents)
    assert set(styles) == {"wrap_easy", "wrap_hard", "wrap_wikipedia", "wrap_qa"}
    for d in documents:
        assert [c.text for c in d.chunks][1:] == ["It is short. ", "It ends."] and d.source == "wrap_baseline"
        assert not any(d.thoughts)
    assert documents == records.documents(again.synthesized("wrap_baseline"), "warm_start")


def test_em_compares_with_paraphrases(small: dict[str, Any], tmp_path: Path) -> None:
    """The whole chain with a teacher: thoughts for the warm start, paraphrases for a baseline."""

    def reply(body: Body) -> Body:
        question = body["messages"][-1]["content"]
        if "Passage:" in question:
            return completion("east den west .")
        return completion(question.split(":\n\n")[-1].strip().replace("so ", "in ") + " .")

    small["synthesize"] = {"method": "latent_thoughts", "teacher": {"model": "m"}}
    small["em"] = {"iterations": 0, "baselines": ["wrap_cot"]}
    small["train"] |= {"steps": 8}
    with Loopback(reply) as server:
        recipe = resolve(small, [f"synthesize.teacher.base_url={server.url}"])
        rows = em(recipe, tmp_path / "run")
    assert [row["method"] for row in rows] == ["wrap_cot", "warm_start"]
    assert 0 <= rows[0]["train_tokens"] - rows[1]["train_tokens"] < 4 * 64  # as many tokens as the warm start
    with pytest.raises(UserError, match="put wrap_cot among em.baselines"):
        em(resolve(small, ["synthesize.method=wrap_cot"]), tmp_path / "other")


def test_thoughts_and_documents_that_repeat_an_evaluation_set(make: Any, tmp_path: Path) -> None:
    known = "Seven friends share twelve apples and each of them eats one before noon on Monday."
    (tmp_path / "set.jsonl").write_text(
        json.dumps({"question": known}) + "\n" + json.dumps({"question": "What?"}) + "\n"
    )
    text = "Sentence 1 of document 3 says that 3 times 1 is 3. Sentence 2 of document 3 says that"
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"q": {"a": [text]}}) + "\n")
    sets = f"contamination.sets={{exam: {tmp_path / 'set.jsonl'}, source: {tmp_path / 'corpus.jsonl'}}}"

    def reply(body: Body) -> Body:
        question = body["messages"][-1]["content"].split("Passage:\n")[-1]
        return completion(f"We know: {known.upper()}") if "Sentence 0 of document 5 " in question else plain_reply(body)

    with Loopback(reply) as server:
        run = make(server.url, sets)
        prepared, counts = run.prepare().counts, run.synthesize().counts
        assert (prepared["contaminated_documents_source"], prepared["evaluation_rows_repeated_source"]) == (1, 1)
        assert (prepared["contaminated_documents_exam"], prepared["warm_start_documents"]) == (0, 20)
        assert (counts["contaminated_thoughts_exam"], counts["evaluation_rows_repeated_exam"]) == (1, 1)
        assert (counts["kept"], counts["raw"]) == (60, 0)
        run = make(server.url, sets, "contamination.remove=true")
        assert run.prepare().counts["warm_start_documents"] == 19
        counts = run.synthesize().counts
        assert (counts["contaminated_thoughts_exam"], counts["kept"], counts["raw"]) == (1, 56, 1)
    assert not any("Seven" in text or "SEVEN" in text for text in thoughts(run).values())


def test_what_a_recipe_may_not_say() -> None:
    for values, message in (
        ({"method": "latent_thoughts"}, "set synthesize.teacher.model"),
        ({"cap": 3}, "a cap needs prices"),
        ({"checks": {"empty": "accept"}}, "synthesize.checks.empty"),
        ({"teacher": {"parameters": {"n": 4}}}, "n is not to be set here: a question has one reply"),
        ({"teacher": {"parameters": {"max_new_tokens": 4}}}, "set synthesize.max_tokens"),
        ({"teacher": {"parameters": {"model": "x"}}}, "set synthesize.teacher.model"),
        ({"teacher": {"parameters": {"stream": True}}}, "a reply is read as a whole"),
        ({"teacher": {"modle": "m"}}, "did you mean synthesize.teacher.model?"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            resolve({"synthesize": values})
    with pytest.raises(UserError, match="paraphrases need a teacher"):
        resolve({"em": {"baselines": ["wrap_cot"]}})
