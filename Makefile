PYTHON ?= python3
BIN := .venv/bin
export RAY_AUTH_MODE ?= disabled
export RAY_USAGE_STATS_ENABLED ?= 0
# A service starts some twenty processes: each would compile all it imports.
unexport PYTHONDONTWRITEBYTECODE
export WAN_DATA_DIR ?= $(CURDIR)/out/data

.PHONY: setup demo serve test lint bench

setup: .venv/.ready  ## create .venv and install everything, at the tested versions

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make setup PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt torch
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable '.[test]'
	# pip would compile everything, on one core. Some files are templates: hence no error.
	$(BIN)/python -m compileall -qq -j 0 $(addprefix .venv/lib/python3*/site-packages/,torch ray transformers) || true
	touch $@

demo: setup  ## start the service, make one video of a prompt, stop the service
	$(BIN)/python -m serve_app.demo

serve: setup  ## start the service on http://127.0.0.1:8000 and leave it running
	@$(BIN)/python -c 'import socket, sys; sys.exit(not socket.socket().connect_ex(("127.0.0.1", 8000)) and "something listens on 127.0.0.1:8000 already: stop it first")'
	$(BIN)/serve run configs/local_tiny.yaml

test: setup  ## run the test suite
	PYTHON=$(BIN)/python tests/run.sh

lint: setup  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: setup  ## measure throughput against the running service on this machine
	$(BIN)/python -m benchmarks.loadgen
