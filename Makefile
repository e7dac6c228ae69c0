# make demo      the main job on the embedded model: dense and pruned side by side
# make test      the fast tests          make test-all   the slow ones too
# make test-engines FAMILIES=llama_gqa   exports in real engines, installed into .engines: gigabytes, an hour
# make lint      ruff and mypy           make clean      remove the environment and caches
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test test-all test-engines lint clean

demo: $(VENV)/base
	$(BIN)/pp-lightning compare --config configs/tiny/compare.yaml --out results/demo

test: $(VENV)/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

test-all: $(VENV)/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

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

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache

# torch first: what needs it must find it, and not choose another build.
$(VENV)/base: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed: make PYTHON=...')"
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable .
	touch $@

$(VENV)/dev: $(VENV)/base
	$(PIP) --editable ".[dev,eval,onnx,gguf,finetune]"
	touch $@
