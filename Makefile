# Every target does the set-up it needs: its own .venv, pinned by constraints.txt, made again only
# when pyproject.toml or constraints.txt changed.  ARGS="..." passes overrides on.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: train test test-slow lint bench ui clean

train: $(READY) ## train on drawn characters, test on unseen ones and on real digits
	$(BIN)/python -m pipeline.train also_test=[digits] $(ARGS)

test: $(READY) ## the default tests, on every core
	$(BIN)/python -m pytest -n logical --dist loadfile $(ARGS)

test-slow: $(READY) ## the tests that take long or start servers
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(READY) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY) ## speed and memory beside what others do, a quarter of an hour
	$(BIN)/python -m benchmarks.run_all

ui: $(READY) ## the MLflow UI on the tracked runs
	$(BIN)/python -m pipeline.ui $(ARGS)

clean: ## remove the virtual environment; data/ and mlruns/ stay
	rm -rf .venv

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed; try: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[dev]'
	touch $(READY)
