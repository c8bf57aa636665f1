PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint wheel-test clean

.venv/.stamp: pyproject.toml setup.py constraints.txt $(wildcard sim/native/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

.venv/.stamp-dev: .venv/.stamp
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/.stamp
	$(BIN)/multilora run demo-servegen
	$(BIN)/multilora run demo-azure

lint: .venv/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	TRITON_INTERPRET=1 $(BIN)/pytest -q -n 2
	$(BIN)/pytest -q --nbmake notebooks
	$(MAKE) wheel-test

wheel-test: .venv/.stamp-dev
	$(BIN)/python tests/wheel.py

clean:
	rm -rf .venv build dist runs *.egg-info
