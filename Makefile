# `make demo` and `make test` need Python >= 3.10 with venv and a C compiler; they download everything else into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DOCS_INSTALLED := $(VENV)/.installed-docs
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-optimized fuzz lint docs package mutants compatibility served gpu clean

demo: $(INSTALLED)
	$(BIN)/python -m hf_awq_offload demo

# One thread to a process: OpenMP threads of several processes on few cores wait for each other at full load.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadgroup

# The package as `python -O` runs it, without its asserts (tests/optimized.py): the whole suite, or OPTIMIZED_TESTS.
test-optimized: $(INSTALLED)
	TEST_OPTIMIZED=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadgroup $(OPTIMIZED_TESTS)

# A million inputs take ten minutes; `make test` runs a few thousand.
fuzz: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/fuzz.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Links, anchors and pages that the navigation leaves out are errors; mkdocs.yml says which.
docs: $(DOCS_INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

package: $(INSTALLED)
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*

# Not in CI. Some hundred mutants of the pure modules, about an hour on one core.
mutants: $(INSTALLED)
	$(PIP_INSTALL) mutmut
	$(BIN)/python tests/bench/mutants.py

# Not in CI. Two environments of 6 GB each; they are made once. Needs python3.10 and python3.12.
compatibility: $(INSTALLED)
	$(BIN)/python tests/bench/compatibility.py --folder .compatibility oldest newest

# Not in CI. vLLM, SGLang and stock transformers read this package's checkpoints on a CPU, and docs/serving.md gets the
# table. Environments of 9 GB in all, made once; then 40 minutes. SERVED="--readers vLLM --kinds Llama" asks for a part.
served: $(INSTALLED)
	PYTHONPATH=$(CURDIR):$(CURDIR)/tests OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m served --folder .served $(SERVED)

# Not in CI. Everything that a real GPU has to say, in nine minutes (docs/gpu.md): with .venv if it is there, else, or if
# PYTHON is given, with that interpreter and what it has. GPU="--only linears --out FILE" passes options. Installs nothing.
GPU_PYTHON := $(if $(filter file,$(origin PYTHON)),$(or $(wildcard $(BIN)/python),$(PYTHON)),$(PYTHON))
gpu:
	PYTHONPATH=$(CURDIR):$(CURDIR)/tests $(GPU_PYTHON) -m gpu $(GPU)

# torch first: once the pinned release is there, nothing else asks for another one.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), f"Python >= 3.10 is needed, this is {sys.version}"'
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) -e '.[test]'
	touch $@

$(DOCS_INSTALLED): $(INSTALLED)
	$(PIP_INSTALL) -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) .compatibility .mypy_cache .ruff_cache .pytest_cache dist site
