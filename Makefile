# Everything happens in .venv, which `make install` makes once and every other target reuses.
PYTHON ?= python3
BIN := .venv/bin
JOBS ?= 2

.PHONY: install demo test check bench docs clean

install: .venv/installed

.venv/installed: pyproject.toml
	@echo "installing into .venv: PyTorch alone is some gigabytes, and pip is silent meanwhile"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: install  ## pre-train on built-in pictures, judge, and write a page to look at
	$(BIN)/caco demo --out runs/demo --overwrite

test: install  ## all tests
	$(BIN)/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

check: install  ## linter, formatter, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

BENCHMARKS := step convolution memory peers bank bank_traffic data loader evaluate start growth

bench: install  ## benchmarks at small sizes (GPU: benchmarks/gpu.py; two machines: benchmarks/two_machines.py)
	for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py --quick || exit 1; done

docs: install  ## the command line reference in docs/, written from the code
	$(BIN)/python docs/write_reference.py

clean:
	rm -rf .venv build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
