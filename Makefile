PYTHON ?= python3
BIN := .venv/bin

# How many processes run tests, each with servers of its own (about 1.5 GB).
WORKERS ?= 2

# What the tests use beside Python: an S3 server, a registry, a browser, a container engine.
TEST_PACKAGES := ceph-mon ceph-osd ceph-common radosgw docker-registry apache2-utils chromium busybox-static docker.io podman catatonit

# What the chaos suite uses.
CHAOS_PACKAGES := ceph-mon ceph-osd ceph-common radosgw postgresql busybox-static docker.io

.PHONY: help install demo demo-down test chaos check bench bench-quick bench-kubernetes clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: .venv/installed ## make .venv from the pinned versions, with this package editable

# A file of ours inside .venv says that it is complete, so that a second call costs nothing.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; where it has another name:  make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 3; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || scripts/debian-packages python3-venv
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install ## run a real algorithm on the sample data, from nothing to a picture
	@scripts/debian-packages busybox-static
	@engine=$$(scripts/engine-up) && export "$$engine" && \
		$(BIN)/python deployments/images/co2-report/build.py && \
		$(BIN)/python examples/demo.py

demo-down: ## stop the Prefect server that the demo left running
	@$(BIN)/python examples/demo.py --down

test: install ## every test, against a real engine, S3 server, Prefect server and browser
	@scripts/debian-packages $(TEST_PACKAGES)
	@engine=$$(scripts/engine-up) && export "$$engine" && \
		$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile $(PYTEST_ARGS)

chaos: install ## kill, cut and corrupt everything while runs go on; CHAOS_SECONDS (480), CHAOS_SEED, CHAOS_ROUND
	@scripts/debian-packages $(CHAOS_PACKAGES)
	@engine=$$(scripts/engine-up) && export "$$engine" && $(BIN)/python -m pytest tests/chaos $(PYTEST_ARGS)
	@CHAOS_SECONDS=$(CHAOS_SECONDS) CHAOS_SEED=$(CHAOS_SEED) CHAOS_ROUND=$(CHAOS_ROUND) $(BIN)/python -m tests.chaos

check: install ## formatting, types, import directions, spelling
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

bench: install ## measure everything that people wait for, into benchmarks/results.md; BENCH_PATH: where other clients are
	@scripts/debian-packages $(CHAOS_PACKAGES)
	@engine=$$(scripts/engine-up) && export "$$engine" && $(BIN)/python -m benchmarks

bench-quick: install ## the same with less, in three minutes; SUBJECT: only one_run, say
	@scripts/debian-packages $(CHAOS_PACKAGES)
	@engine=$$(scripts/engine-up) && export "$$engine" && $(BIN)/python -m benchmarks --quick $(SUBJECT)

bench-kubernetes: install ## what the Kubernetes engine costs, on the cluster that KUBECONFIG names, whose node is this machine
	@scripts/debian-packages $(CHAOS_PACKAGES)
	@engine=$$(scripts/engine-up) && export "$$engine" && $(BIN)/python -W ignore -m benchmarks kubernetes

clean: ## remove what was made here: .venv, the demo's files, caches
	@[ ! -e .demo/server.pid ] || $(BIN)/python examples/demo.py --down
	rm -rf .venv .demo test-results build *.egg-info .*_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
