# Everything runs from a virtual environment of this checkout; no root, nothing installed outside it.
VENV ?= .venv
# The exit status says whether an interpreter is supported. A name that a version manager left behind does not even run.
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c '$(SUPPORTED)' 2>/dev/null && { echo $$p; break; }; done)
# Another supported interpreter on this machine, of another version than PYTHON; empty when there is none.
OTHER_PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 $(HOME)/.pyenv/versions/3.1[123].*/bin/python3; do \
	$$p -c '$(SUPPORTED)' 2>/dev/null || continue; \
	test "$$($$p -c 'import sys; print(sys.version_info[1])')" != "$$($(PYTHON) -c 'import sys; print(sys.version_info[1])')" \
	&& echo $$p; done | tail -n 1)
READY := $(VENV)/.ready
RUN := $(VENV)/bin
# Most tests wait more than they compute. Each worker takes whole files, in their order: the long ones, of tests/cluster,
# before the short ones, so that no worker is left alone at the end.
IN_PARALLEL ?= --numprocesses=2 --dist=loadfile --no-loadscope-reorder
PACKAGES := protocol shared services deploy tests
QUICK_TESTS := tests/unit tests/cluster/test_disk.py

.PHONY: help setup demo linux-demo test test-other-python soak chaos lint bench docs clean

help: ## what can be made
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" && $(PYTHON) -c '$(SUPPORTED)' 2>/dev/null || { \
	echo "pefbox needs Python 3.11, 3.12 or 3.13, and '$(PYTHON)' is none that runs (set PYTHON=...)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@# A cluster starts many processes: each would compile the project for itself where Python may not write its cache.
	@$(RUN)/python -m compileall -q $(PACKAGES)
	touch $@

setup: $(READY) ## the virtual environment

demo: $(READY) ## set up, then run the main job: two hosts, two secure VMs, every check
	$(RUN)/pefbox demo

NEED_FIRMWARE := import sys; from deploy.firmware import PACKAGE, find_firmware; \
	sys.exit(None if find_firmware() else f"pefbox: no SLOF on this machine: apt-get install {PACKAGE}")

linux-demo: $(READY) ## the same with Linux: set up, build its kernel where it lacks, two hosts, two secure VMs
	@$(RUN)/python -c '$(NEED_FIRMWARE)'
	$(RUN)/pefbox linux build
	$(RUN)/pefbox demo --guest linux

test: $(READY) ## set up, then run all tests
	$(RUN)/ruff check .
	$(RUN)/mypy
	$(RUN)/pytest $(IN_PARALLEL)

test-other-python: ## unit tests and the life of a secure VM under another supported Python, where there is one
	@if test -z "$(OTHER_PYTHON)"; then echo "no other supported Python here"; else \
	$(MAKE) --no-print-directory VENV=.venv-other PYTHON=$(OTHER_PYTHON) setup && \
	.venv-other/bin/python --version && .venv-other/bin/pytest $(IN_PARALLEL) -m "not slow and not hypothesis" $(QUICK_TESTS); fi

soak: $(READY) ## two minutes of load: no process may be called hung (docs/liveness.md)
	PEFBOX_SOAK_SECONDS=120 $(RUN)/pytest tests/cluster/test_liveness.py -k busy_machine -s

chaos: $(READY) ## minutes of migrations that go wrong: every order of events, 10,000 tampered streams (docs/migration.md)
	PEFBOX_MODEL=full $(RUN)/pytest tests/unit/test_migration_model.py tests/unit/test_migration_stream.py -v
	PEFBOX_CHAOS_MIGRATIONS=200 $(RUN)/pytest tests/cluster/test_migration_chaos.py -s

lint: $(READY) ## style and types only
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

bench: $(READY) ## figures against their floors, into build/bench.json
	$(RUN)/python -m tests.bench

docs: $(READY) ## what is generated: docs/protocol.md
	$(RUN)/python -m protocol.reference > docs/protocol.md

clean: ## remove what was made in this checkout
	rm -rf $(VENV) .venv-other build *.egg-info
