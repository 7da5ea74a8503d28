# Everything in one virtual environment in the checkout; `make demo` and `make test` set it up by themselves.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test quick lint coverage docs setup serve page benchmark clean
.DEFAULT_GOAL := demo

setup: .venv/.ready

.venv/.ready: pyproject.toml
	@echo 'setting .venv up: about 2 GB, some minutes'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet 'torch>=2.11,<2.14'
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/python jobs/vsd_particles.py --n 8

serve: setup
	$(BIN)/python -m serve

page: # the bundle in serve/static; needs Node.js
	cd serve/page && npm ci && npm run build

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest -n 2 --dist loadfile

quick: setup # what needs neither Ray nor a browser, nor much time
	$(BIN)/pytest -n 2 --dist loadfile -m "not ray and not browser and not slow"

coverage: setup # which lines no test of this machine ran: a report, not a gate
	$(BIN)/coverage erase
	$(BIN)/pytest -n 2 --dist loadfile --cov --cov-report=term --cov-report=html:build/coverage

docs: setup # pages of the API from the docstrings, in build/api
	$(BIN)/pip install --quiet --editable '.[docs]'
	$(BIN)/pdoc --docformat markdown --output-directory build/api raydream serve

benchmark: setup
	$(BIN)/python jobs/benchmark.py

clean:
	rm -rf .venv build dist *.egg-info
