"""watch: runs that work, are finished, have died or are half written, as the terminal shows them."""

from __future__ import annotations

import fcntl
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from latent_thoughts import cli
from latent_thoughts.metrics import Metrics
from latent_thoughts.progress import ProgressFile, track
from latent_thoughts.store import run_lock, write_json
from latent_thoughts.types import UserError
from latent_thoughts.watch import look, over, watch
from latent_thoughts.watch.reading import find, read
from latent_thoughts.watch.showing import show, sparkline, warnings

SAMPLED = {"seconds": 62.0, "accepted_share": 0.61, "mean_ess": 3.2, "gain_per_token": 0.42, "unfinished_share": 0.02,
           "mean_distinct": 3.0}  # fmt: skip


def stage(folder: Path, counts: dict[str, Any] | None = None) -> Path:
    """A stage that has begun; with counts, one that is done."""
    write_json(folder / "stage.json", {"stage": folder.name, "key": "k"})
    if counts is not None:
        write_json(folder / "manifest.json", {"stage": folder.name, "key": "k", "shards": {}, "counts": counts})
    return folder


def gone() -> int:
    """The number of a process that has ended."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """A run in the middle of its first M-step, which this process holds."""
    folder = tmp_path / "run"
    for name in ("base", "prepare", "iter_00/synthesize"):
        stage(folder / name, {})
    stage(folder / "iter_00/train", {"seconds": 185.0})
    stage(folder / "iter_00/evaluate", {"seconds": 12.4, "accuracy": 0.4, "nll_bits_per_byte": 1.234})
    stage(folder / "iter_01/sample", SAMPLED)
    training = stage(folder / "iter_01/train")
    lines = [{"step": 10 * n, "loss": 2.0 / n, "norm": 0.8, "tokens_per_second": 12300.0} for n in range(1, 41)]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 401, "loss": 1'
    (training / "metrics.jsonl").write_text(text)
    (folder / "recipe.yaml").write_text("em: {iterations: 2, baselines: [raw_tokens]}\n")
    progress = {"work": "train", "total": 1000, "unit": "steps", "pid": os.getpid(), "done": 400, "rate": 20.0,
                "began": 0.0, "time": 0.0, "figures": {"loss": 0.05}}  # fmt: skip
    (folder / "progress.json").write_text(json.dumps(progress))
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        print(os.getpid(), end="", file=lock, flush=True)
        yield folder


def complete(run: Path) -> None:
    """Ends it, with results."""
    (run / "recipe.yaml").write_text("em: {iterations: 1}\n")
    for name in ("train", "evaluate"):
        stage(run / "iter_01" / name, {"seconds": 1.0})
    write_json(run / "results.json", {"rows": []})


def shown(folder: Path, width: int = 120) -> str:
    """What the terminal shows, without spaces at the lines' ends."""
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(show(folder, [read(found) for found in find(folder)], time.time(), width))
    return "\n".join(line.rstrip() for line in console.export_text().splitlines())


def test_a_run_that_works(run: Path) -> None:
    said = shown(run)
    assert "working  last sign 0 s ago" in said.replace("\n", "")
    table = [line.split() for line in said.splitlines()]
    assert ["✓", "base", "✓", "prepare", "synthesize", "sample", "train", "evaluate", "accuracy", "accepted",
            "ESS", "gain/token", "unfinished", "bits/byte"] in table  # fmt: skip
    assert ["warm", "start", "✓", "✓", "3:05", "✓", "12", "s", "40.0", "%", "1.23"] in table  # bits a byte
    assert ["EM", "1", "✓", "1:02", "▸", "·", "61.0", "%", "3.20", "0.420", "2.0", "%"] in table
    assert ["EM", "2", "·", "·", "·"] in table
    assert ["raw_tokens", "·", "·"] in table
    assert f"train  {'━' * 12}{'─' * 18}  400 of 1,000 steps  20.0/s  30 s left" in said
    assert "2.00 → 0.0500  iter_01/train, step 400" in said  # the line that is half written is not there yet
    assert "12,300 tokens/s  gradient norm 0.800" in said
    assert "Stopped" not in said


@pytest.mark.parametrize("width", [60, 80, 100])
def test_narrow_terminals_leave_figures_out_and_cut_none(run: Path, width: int) -> None:
    lines = shown(run, width).splitlines()
    table = [line for line in lines if "synthesize" in line or line.strip().startswith(("EM", "warm", "raw_"))]
    assert len(table) == 5
    assert not any("…" in line for line in table)
    assert ("accuracy" in table[0]) == (width > 60)
    assert ("bits/byte" in table[0]) == (width > 100)


@pytest.mark.parametrize("width", [40, 60, 80])
def test_no_figure_is_parted_from_its_name(run: Path, width: int) -> None:
    metrics = run / "iter_01/train/metrics.jsonl"
    last = {"step": 400, "loss": 0.34, "norm": 0.8, "lr": 0.0003, "tokens_per_second": 12300.0, "memory_gb": 0.664}
    metrics.write_text(json.dumps(last) + "\n")
    said = shown(run, width)
    for part in ("12,300 tokens/s", "gradient norm 0.800", "lr 0.000300", "0.664 GB", "iter_01/train, step 400",
                 "400 of 1,000 steps", "30 s left"):  # fmt: skip
        assert any(part in line for line in said.splitlines())
    assert ("─" * 4 in said.splitlines()[-4 if width > 60 else -5]) == (width > 40)


def test_a_run_that_died_says_how_to_go_on(run: Path) -> None:
    (run / ".lock").write_text(str(gone()))
    said = shown(run)
    assert "  stopped  " in said.replace("\n", "")
    assert "run the same command again" in said
    assert "left" not in said  # no time is left to what does not work
    assert "iter_01/train, step 400" in said


@pytest.mark.parametrize("pid", [gone, os.getpid])
def test_a_finished_run(run: Path, pid: Callable[[], int]) -> None:
    """Results come last. Its process may have gone on to another run."""
    (run / ".lock").write_text(str(pid()))
    complete(run)
    later = time.time() + 1
    os.utime(run / "results.json", (later, later))
    assert "  finished  " in shown(run).replace("\n", "")
    os.utime(run / "progress.json", (later + 1, later + 1))  # it is begun anew, or was and died
    assert ("  working  " if pid is os.getpid else "  finished  ") in shown(run).replace("\n", "")


def test_results_of_a_single_evaluation_end_no_run(run: Path) -> None:
    (run / ".lock").write_text(str(gone()))
    stage(run / "iter_01/train", {"seconds": 1.0})
    write_json(run / "results.json", {"rows": [{"method": "warm_start"}]})
    later = time.time() + 1
    os.utime(run / "results.json", (later, later))
    said = shown(run)
    assert "  idle  " in said.replace("\n", "")  # its last command came to its end
    assert "the next command goes on from here" in said and "Stopped" not in said


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="nobody tells who holds a lock")
def test_the_number_of_another_process_holds_nothing(run: Path) -> None:
    """One that got the number later, or has it on this machine where the run was copied from another."""
    (run / ".lock").write_text(str(os.getppid()))
    assert "  stopped  " in shown(run).replace("\n", "")


def test_variants_and_what_the_recipe_does_not_name_are_listed(run: Path) -> None:
    (run / "recipe.yaml").write_text(
        "em: {iterations: 1, variants: {few: {sample: {k: 2}}, long: {em: {iterations: 2}}}}"
    )
    stage(run / "variants/few/iter_01/sample", SAMPLED)
    stage(run / "baselines/raw/train", {"seconds": 1.0})
    stage(run / "samples/em_2/iter_01/sample", SAMPLED)
    stage(run / "samples/em_2/iter_01.old/sample", SAMPLED)  # somebody's copy
    rows = {row.name: {name: part.state for name, part in row.parts.items()} for row in read(run).rows}
    whole = {"sample": "open", "train": "open", "evaluate": "open"}
    assert rows["variant few 1"] == {**whole, "sample": "done"}
    assert rows["variant long 1"] == rows["variant long 2"] == whole
    assert rows["raw"] == {"train": "done"}
    assert [name for name in rows if name.startswith("em_2")] == ["em_2 1"]


def test_the_command(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["latent-thoughts", "watch", str(run), "--once"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    assert "400 of 1,000 steps" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["progress.json", "iter_01/sample/manifest.json", "recipe.yaml", ".lock",
                                  "iter_01/train/metrics.jsonl", "base/stage.json"])  # fmt: skip
@pytest.mark.parametrize("content", [b"", b'{"wor', b"[1]", b"\xff\xfe\x00", b"null\n"])
def test_half_written_files_are_not_there_yet(run: Path, name: str, content: bytes) -> None:
    (run / name).write_bytes(content)
    assert str(run.name) in shown(run)


def test_several_runs_are_a_line_each(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "grid" / "cell_2"
    stage(other / "base", {})
    table = [line.split() for line in shown(tmp_path).splitlines()]
    assert ["grid/cell_2", "idle", "1/5"] in table
    assert ["run", "working", "6/13", "iter_01/train", "40", "%"] in table
    assert any(line[:2] == ["EM", "1"] for line in table)  # in full: it works


def test_no_run_is_one_clear_line(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match="holds no run") as error:
            watch(folder)
        assert "\n" not in str(error.value)


def test_warnings(run: Path) -> None:
    stage(run / "iter_01/sample", {**SAMPLED, "unfinished_share": 0.4, "accepted_share": 0.05, "mean_distinct": 1.2,
                                    "chunks": 10, "draws": 40, "unfinished": 16})  # fmt: skip
    write_json(run / "iter_01/train/diverged_step_7_rank_0.json", {})
    state = read(run)
    said = " / ".join(warnings(state, state.sign + 300))
    for part in ("diverged: iter_01/train/diverged", "no sign of life for 5:00", "40.0 % of the draws found no end",
                 "only 5.0 % of the texts", "draws hardly differ"):  # fmt: skip
        assert part in said
    assert next(iter(warnings(read(run), state.sign))).startswith("training diverged")
    cut = {"unfinished_share": 0.7, "mean_distinct": 1.1, "chunks": 10, "draws": 40, "unfinished": 28}
    stage(run / "iter_01/sample", {**SAMPLED, **cut})
    assert "draws hardly differ" not in " ".join(warnings(read(run), 0.0))  # nearly all that ended do


def test_it_watches_until_the_run_ends(run: Path) -> None:
    """A live terminal, and a process that dies while it is watched."""
    hold = "import sys, time; from pathlib import Path; from latent_thoughts.locks import run_lock\n"
    hold += "with run_lock(Path(sys.argv[1])): time.sleep(60)"
    (run / ".lock").unlink()
    process = subprocess.Popen([sys.executable, "-c", hold, str(run)])
    while read(run).status != "working":
        assert process.poll() is None
        time.sleep(0.05)
    screen = Console(file=io.StringIO(), force_terminal=True, width=120, record=True)

    def end() -> None:
        process.terminate()
        process.wait()

    threading.Timer(0.5, end).start()
    watch(run, every=0.05, console=screen)
    said = screen.export_text()
    assert "working" in said and "stopped" in said


def test_it_waits_for_the_cells_of_an_experiment(tmp_path: Path) -> None:
    """Between the runs of its seeds, whose results are there, and those of its cells nothing works for a moment."""
    seed = tmp_path / "seed_0"
    stage(seed / "base", {})
    with run_lock(tmp_path):
        later = time.time() + 1
        write_json(tmp_path / "results.json", {"rows": []})
        os.utime(tmp_path / "results.json", (later, later))
        assert not over(tmp_path, look(tmp_path))
        assert over(seed, look(seed))
    assert over(tmp_path, look(tmp_path))


def test_it_takes_no_lock_and_writes_nothing(run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    watch(run, once=True, console=Console(file=io.StringIO()))  # this process holds the lock
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_working_process_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ProgressFile, "EVERY", 0.0)
    with track("sample", 4, "documents") as advance:
        advance(1)  # holds no run: nothing to write to
    with run_lock(tmp_path), track("sample", 4, "documents") as advance:
        advance(1, ess=2.5)
        time.sleep(0.02)
        advance(2, ess=3.5, gain=float("nan"))
        found = json.loads((tmp_path / "progress.json").read_text())
    assert (found["work"], found["done"], found["total"], found["unit"]) == ("sample", 3, 4, "documents")
    assert found["figures"] == {"ess": 3.5}
    assert 0 < found["rate"] <= 2 / 0.02
    assert not list(tmp_path.glob(".progress*"))


def test_lines_being_written_are_read_as_far_as_they_are(run: Path) -> None:
    """A reader beside a writer: every look is a whole one."""
    metrics, stop = Metrics(run / "iter_01/train", 400), threading.Event()

    def write() -> None:
        step = 400
        while not stop.is_set():
            step += 1
            metrics.write({"step": step, "loss": 1.0})

    writer = threading.Thread(target=write)
    writer.start()
    try:
        steps = [read(run).metrics[-1]["step"] for _ in range(30)]
    finally:
        stop.set()
        writer.join()
        metrics.close()
    assert steps == sorted(steps)


@pytest.mark.parametrize(
    ("values", "drawn"),
    [([0.0, 1.0], "▁█"), ([3.0, 3.0], "▁▁"), ([1.0], "▁"), ([float(n) for n in range(8)], "▁▂▃▄▅▆▇█")],
)
def test_sparkline(values: list[float], drawn: str) -> None:
    assert sparkline(values) == drawn
    assert len(sparkline(values * 100)) == 48
