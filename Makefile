# `make quickstart` and `make test` make what they need; everything else is optional.
PYTHON ?= $(or $(shell for p in python3.11 python3.12 python3.13 python3.14; do \
	command -v $$p && break; done),python3.11)
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/quickstart

.PHONY: help quickstart test lint demo serve clean

help:
	@echo "make quickstart  train, export, serve and score soft prompts on real sentences"
	@echo "make test        lint, types and tests"
	@echo "make demo        the Gradio page, on what the quick start made"
	@echo "make serve       the HTTP server, on what the quick start made"
	@echo "make clean       remove the environment and caches (not runs/)"

$(VENV)/ready: pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is not here: install Python 3.11 or newer, or pass PYTHON=..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[all,dev]"
	@touch $@

quickstart: $(VENV)/ready
	$(BIN)/python -m trainer quickstart --out $(OUT)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Triton's server, for one test: only Linux on x86-64 has it, elsewhere that test is skipped. Its
# Python backend wants an older numpy than the project has.
$(VENV)/triton: | $(VENV)/ready
	@$(BIN)/python -m venv $@ && $@/bin/python -m pip install --quiet --disable-pip-version-check \
		--no-deps "nvidia-pytriton~=0.7.0" "numpy<2" onnxruntime tokenizers \
		|| { rm -rf $@; echo "Triton's server is not to be had here: its test will be skipped"; }

# Two halves side by side, a core each: torch's threads would take the other half's core and wait
# for it. The integration tests, but for those that make the halves equal, report when both are done.
EVEN := $(addprefix tests/integration/test_,reproduce_parallel.py embed_encoder.py)
test: export OMP_NUM_THREADS = 1
test: lint $(VENV)/triton
	@$(BIN)/python -m pytest tests/integration $(EVEN:%=--ignore=%) >.integration.log 2>&1 & other=$$!; \
	$(BIN)/python -m pytest tests/unit tests/e2e $(EVEN); first=$$?; \
	wait $$other; second=$$?; cat .integration.log; rm -f .integration.log; \
	exit $$((first || second))

demo: $(VENV)/ready
	$(BIN)/python -m demo $(if $(filter runs/quickstart,$(OUT)),,$(OUT)/bundle)

serve: $(VENV)/ready
	$(BIN)/python -m serve http $(OUT)/bundle

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache build *.egg-info
