# The two commands: `make demo` and `make test`. Each builds .venv on its first run; later runs start at once.
#
#   make demo PYTHON=/usr/bin/python3.13     another interpreter (3.11 or newer)
#   make test PYTEST_ARGS="-x tests/io"      other arguments for pytest

# The first of these that is recent enough; the loop prints nothing when none is.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$p"; break; }; done)
VENV ?= .venv
PYTEST_ARGS ?= -n 2
BENCH_ARGS ?=
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check install -qq

.PHONY: help demo test lint unit vm-guest docs bench clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo    build a chain of disk images, convert and check it, draw its allocation (in demo-out/)'
	@echo 'make test    lint, type check and run all tests'
	@echo 'make lint    ruff and mypy only'
	@echo 'make vm-guest  fetch the small guest that tests/vm boots (Debian, x86_64); without it they are skipped'
	@echo 'make docs    bring the generated parts of docs/ up to date'
	@echo 'make bench   compare with qemu-img on this machine (see benchmarks/README.md)'
	@echo 'make clean   remove what these commands made, .venv included'

demo: $(VENV)/.installed
	@$(VENV)/bin/python demo/run.py

test: lint unit

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy --strict

unit: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

# Kernel and busybox of the distribution, in build/vm; needs no root.
vm-guest: | $(VENV)/bin/python
	@$(VENV)/bin/python tests/vm/guest.py build/vm

docs: $(VENV)/.installed
	$(VENV)/bin/python docs/generate.py

bench: $(VENV)/.installed
	$(VENV)/bin/python benchmarks/run.py $(BENCH_ARGS)

# A half-made environment is removed, so that the next run starts afresh once the missing package is there.
$(VENV)/bin/python:
	@test -n '$(PYTHON)' || { echo 'byre needs Python 3.11 or newer; say which one with: make PYTHON=/path/to/python3' >&2; exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo '$(PYTHON) is not Python 3.11 or newer; say which one with: make PYTHON=/path/to/python3' >&2; exit 1; }
	@'$(PYTHON)' -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo '$(PYTHON) cannot make virtual environments: on Debian and Ubuntu, apt install python3-venv' >&2; exit 1; }
	@echo 'making $(VENV) with $(PYTHON)'
	@'$(PYTHON)' -m venv '$(VENV)' || { rm -rf '$(VENV)'; exit 1; }

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	@echo 'installing byre and what it needs into $(VENV)'
	@$(PIP) --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	@echo 'installing byre and the development tools into $(VENV)'
	@$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) demo-out build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
