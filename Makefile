# The two commands: `make demo`, then `make test`. Both work on a fresh clone with Python 3.11 to 3.13 and two CPU cores.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test coverage lint bench bench-full install install-dev clean

demo: install
	$(BIN)/latentsmith demo --out demo

# Two processes with one thread each: tiny tensors gain nothing from more.
test: install-dev lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

# The share of lines and branches that the tests run.
coverage: install-dev
	$(BIN)/pytest --cov --cov-report term:skip-covered

# Side by side with the peers; minutes with nothing else running. `benchmarks/*.py --help` has the larger forms.
bench: install-dev
	mkdir -p bench
	$(BIN)/python benchmarks/data.py bench --json bench/data.json
	$(BIN)/python benchmarks/training.py bench --size small
	$(BIN)/python benchmarks/sampling.py bench --size small
	$(BIN)/python benchmarks/machine.py bench --rows ceiling,startup,curves,ranks

# Every row of docs/performance.md: an hour and more, 20 GiB of memory.
bench-full: bench
	$(BIN)/python benchmarks/training.py bench --size full --steps 5 --json bench/training.json
	$(BIN)/python benchmarks/sampling.py bench --size full --json bench/sampling.json
	$(BIN)/python benchmarks/sampling.py bench --size full --steps 25 --rounds 2
	test -d bench/ldm || $(BIN)/pip install --quiet --no-deps --target bench/ldm stable-diffusion-sdkit einops
	$(BIN)/python benchmarks/machine.py bench --rows vae,checkpointing,ldm,compile --json bench/machine.json
	$(BIN)/python benchmarks/gpu.py

lint: install-dev
	$(BIN)/ruff check src tests examples benchmarks
	$(BIN)/ruff format --check src tests examples benchmarks
	$(BIN)/mypy

install: .venv/installed
install-dev: .venv/installed-dev

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

# open_clip comes without its dependencies: only its vocabulary file is read, and they would bring torchvision.
.venv/installed-dev: .venv/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/pip install --quiet --no-deps open-clip-torch
	touch $@

clean:
	rm -rf .venv demo runs bench .coverage*
