# make install   .venv with pinned dependencies and the package, editable, its extension built
# make demo      installs, then trains a tiny multi-turn editor end to end -> runs/demo/report.html
# make test      installs, then runs every test, on two processes (JOBS=n for another number)
# make lint      ruff and mypy
# make bench     every bench at a small size under pytest-benchmark, peers beside ours; the run is saved in .benchmarks
# make bench-compare   the same again, beside the last saved run (BASE=0003: another)
# PYTHON=python3.12 chooses another interpreter; setup.py lists the switches of the build.

PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
STAMP := $(VENV)/.installed

.PHONY: install demo test lint bench bench-compare clean
install: $(STAMP)

# torch goes first, alone: an index that offers several builds of it then settles which one everything else gets.
$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "mtedit_fast needs Python 3.11 or newer, and '$(PYTHON)' is not: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PIP) setuptools wheel pybind11
	$(PIP) --no-build-isolation --editable ".[dev,export]"
	@$(BIN)/python -c 'from mtedit_fast.ops import _cpp; print("C++ kernels:", _cpp.unavailable_reason() or "ready")'
	@touch $(STAMP)

demo: install
	$(BIN)/mtedit-fast demo

# Tests are small: one thread per process, and as many processes as cores, is what is fastest.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Compiled peers take most of the ten minutes, the first time.
SPEED := $(BIN)/python -m pytest benchmarks -o python_files="bench_*.py" --benchmark-only --benchmark-max-time=0.3 \
  --benchmark-min-rounds=3 --benchmark-columns=median,iqr,ops,rounds --benchmark-sort=name

bench: install
	$(SPEED) --benchmark-autosave

bench-compare: install
	$(SPEED) --benchmark-compare$(if $(BASE),=$(BASE))

clean:
	rm -rf $(VENV) build dist *.egg-info
