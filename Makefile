# Two commands: `make demo` and `make test`.  Both make their own virtual environment in .venv first.
PYTHON      ?= python3
VENV        ?= .venv
TORCH_INDEX ?=
CONFIG      ?= configs/demo.py
PY          := $(VENV)/bin/python
# Large temporary buffers in huge pages: otherwise a training step on a CPU spends much of its time on page faults (glibc 2.35 and later).
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: help demo test lint bench tensorboard clean
help:           ## what there is
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/ \t/' | expand -t 14

demo: $(VENV)/.runtime   ## render, prepare, train, evaluate, report, export (FRESH=1 starts over, CONFIG=configs/synthetic.py)
	$(PY) -m hawk_jax demo $(CONFIG) $(if $(filter 1,$(FRESH)),--fresh)

test: $(VENV)/.dev       ## lint and the whole test suite (TORCH_INDEX=URL names another index for torch)
	$(PY) -m ruff check .
	$(PY) -m pytest

lint: $(VENV)/.dev       ## ruff only
	$(PY) -m ruff check .

bench: $(VENV)/.dev      ## benchmarks, results in benchmarks/results
	$(PY) -m benchmarks

tensorboard: $(VENV)/.runtime  ## scalars of the runs in runs/
	$(PY) -m pip install -q tensorboard && $(VENV)/bin/tensorboard --logdir runs

clean:          ## remove runs and the environment
	rm -rf runs $(VENV)

$(VENV)/.runtime: requirements.txt launch/setup.sh
	PYTHON=$(PYTHON) bash launch/setup.sh $(VENV) requirements.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime requirements-dev.txt
	PYTHON=$(PYTHON) TORCH_INDEX=$(TORCH_INDEX) bash launch/setup.sh $(VENV) requirements-dev.txt
	@touch $@
