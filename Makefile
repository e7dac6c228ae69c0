# make demo      six methods on the embedded model, on two kinds of text: a table, a picture, three lines; about a minute
# make test      the fast tests          make test-all   the slow ones too
# make test-engines FAMILIES=llama_gqa   exports in real engines, installed into .engines: gigabytes, an hour
# make docs      the documentation as pages in build/docs, from an environment of its own
# make lint      ruff and mypy           make clean      remove the environments and caches
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DOCS   := .venv-docs
# make CONSTRAINTS= takes the newest versions instead of the tested ones
CONSTRAINTS := --constraint constraints.txt
PIP    := $(BIN)/python -m pip install --quiet $(CONSTRAINTS)

.PHONY: demo test test-all test-engines docs lint clean

demo: $(VENV)/base
	$(BIN)/pp-lightning demo --out results/demo

# Each process begins with half of the files: what a file prepares, and what it imports, is then there once.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test: $(VENV)/dev
	$(PYTEST) -m "not slow"

test-all: $(VENV)/dev
	$(PYTEST)

ENGINES  := llama.cpp,transformers,onnxruntime-genai,openvino,vllm,lm-eval
FAMILIES := llama,llama_gqa,mistral,qwen2,qwen3,gemma,opt,phi3

test-engines: $(VENV)/dev
	$(BIN)/python benchmarks/engines.py install .engines --engines $(ENGINES)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/engines.py run .engines --engines $(ENGINES) --families $(FAMILIES) --out .engines/results.json
	$(BIN)/python benchmarks/engines.py table .engines/results.json

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(DOCS)/ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) $(DOCS) build *.egg-info .pytest_cache .ruff_cache .mypy_cache

# torch first: what needs it must find it, and not choose another build.
$(VENV)/base: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=...')"
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable ".[app]"
	touch $@

$(VENV)/dev: $(VENV)/base
	$(PIP) --editable ".[app,dev,eval,onnx,gguf,finetune]"
	touch $@

# What reads docstrings from the sources needs no torch.
$(DOCS)/ready: constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet $(CONSTRAINTS) mkdocs-material "mkdocstrings[python]"
	touch $@
