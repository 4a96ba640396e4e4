# Everything that a person or a machine does with a checkout.  `make` alone lists it.
#
# .venv is made on the way, and brought up to date when a requirements file is newer than its stamp.  PYTHON=... names
# another interpreter for it; settings go along: make run APP_PORT=5001

PY := .venv/bin/python
PYTEST := $(PY) -m pytest
# twice as many as there are processors: tests of daemons wait half of their time
SIDE_BY_SIDE := -n $(shell echo $$(( 2 * $$(nproc) ))) --maxprocesses 8 --dist worksteal
RANDOM_CASES := tests/test_relay_loop.py tests/test_request_head.py tests/test_response_head.py tests/test_framing.py \
	tests/test_demand_histories.py tests/test_fuzz.py
SEEDED := $(if $(SEED),--hypothesis-seed=$(SEED))

# Where it is set, each process of the tests, and each daemon and engine that they start, would compile all of it anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help run demo test whole check e2e browser chaos slow fuzz bench clean

help:           ## this list
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / {sub(/:.*/, "", $$1); printf "make %-7s %s\n", $$1, $$2}' Makefile

run: .venv/run.stamp            ## find or install vLLM, start the daemon, load a demo model, show its first answer
	@$(PY) -m scripts.run

demo: .venv/run.stamp           ## the same with a simulated engine: up in seconds, no vLLM, no model
	@$(PY) -m scripts.run --demo

test: .venv/dev.stamp           ## check, and the tests that need neither an engine nor much time (under two minutes)
	@$(MAKE) --no-print-directory --jobs 2 quick check

quick: .venv/tests.stamp
	$(PYTEST) $(SIDE_BY_SIDE) -m "not whole"

whole: .venv/dev.stamp          ## whole daemons and the programs around them, with simulated engines
	$(PYTEST) $(SIDE_BY_SIDE) -m whole

check: .venv/dev.stamp          ## ruff, mypy, who may import whom, risky calls, secrets, packages with known holes
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=target lint types imports security

.PHONY: quick lint types imports security     # parts of the above, side by side
lint:
	$(PY) -m ruff check .

types:
	$(PY) -m mypy

imports:
	$(PYTEST) tests/test_imports.py

security:
	$(PY) -m scripts.check_security

e2e: .venv/dev.stamp            ## the tests with real vLLM, which is installed when there is none
	$(PY) scripts/setup_engine.py
	$(PYTEST) tests/e2e

browser: .venv/browser.stamp    ## the page in Chromium (Debian: apt install chromium), with simulated engines
	$(PYTEST) tests/browser

chaos: .venv/dev.stamp          ## faults under load, drawn from a seed, and what must hold after each: SEED=7 MINUTES=5
	@$(PY) -m tests.chaos $(if $(SEED),--seed $(SEED)) --minutes $(or $(MINUTES),5) $(if $(KINDS),--kinds $(KINDS))

slow: .venv/dev.stamp           ## thousands of random cases (SEED=7), a soak, a thousand instances, boxes of GPUs (no vLLM)
	HYPOTHESIS_PROFILE=ci $(PYTEST) $(SIDE_BY_SIDE) --timeout 2400 $(SEEDED) $(RANDOM_CASES)
	HYPOTHESIS_PROFILE=ci $(PYTEST) -rs --timeout 2400 $(SEEDED) tests/slow tests/chaos

fuzz: .venv/dev.stamp           ## look for input that breaks its readers, guided by coverage; MINUTES=60 in all
	$(PY) -m pip install -q 'atheris>=3,<4'
	$(PY) -m tests.fuzz --seconds $$(($(or $(MINUTES),60) * 60))

bench: .venv/dev.stamp          ## the proxy's speed beside direct access and other proxies; JSON=FILE: its samples
	$(PY) benchmarks/run.py $(if $(JSON),--json $(JSON))

clean:          ## remove what the above left in the checkout (the engine's cache folder stays)
	rm -rf .venv build benchmarks/build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/run.stamp: requirements.txt scripts/make_venv.sh
	@scripts/make_venv.sh requirements.txt
	@touch $@

.venv/dev.stamp: requirements-dev.txt requirements.txt client/requirements.txt scripts/make_venv.sh
	@scripts/make_venv.sh requirements-dev.txt --no-compile    # most of its 9,000 modules are never imported
	@touch $@ .venv/run.stamp

# Once, on one processor and beside the types: else each of the tests' processes compiles all of them.  What is wrong with
# one is for the run itself to say.
.venv/tests.stamp: .venv/dev.stamp
	@$(PYTEST) --collect-only >/dev/null || true
	@touch $@

.venv/browser.stamp: requirements-browser.txt .venv/dev.stamp
	@scripts/make_venv.sh requirements-browser.txt
	@touch $@
