# make demo: a synthetic log, prepared, trained on two ranks, evaluated, with a report. make test: the tests.
# Both set up .venv first. Given: Python 3.11 or newer and make. PYTHON names another Python; TORCH_INDEX_URL an index of
# CPU-only torch builds (launch/stack.py).
PYTHON ?= python3
VENV := .venv/bin
# Container images set it. Hundreds of processes would each compile what they import.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test unit test-slow bench peers lint style
.DELETE_ON_ERROR:

demo: .venv/.ready
	$(VENV)/python launch/demo.py --output .demo

# Three files of tests at a time on two cores: most of a test's time is one core's, and a fifth of it
# waits. In the order in which they are found (tests/conftest.py): the long ones come first, and none
# of the processes waits long for the others at the end.
test: .venv/.ready lint
	$(VENV)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

# Those that start no process.
unit: .venv/.ready
	$(VENV)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m 'not ranks and not slow' tests/unit

test-slow: .venv/.ready
	$(VENV)/python -m pytest -m slow

# Every benchmark in its short form, over the records of full ones, and the tables of benchmarks/README.md anew.
# recbole_peer and time_to_quality are among them once there is `make peers`.
BENCHMARKS := train_step parts precision scaling checkpoint prepare stream balance ranking serving $(if $(wildcard .venv-peers/.ready),recbole_peer) \
	$(if $(and $(wildcard .venv-peers/.ready),$(wildcard .venv-rectools/.ready)),time_to_quality)
bench: .venv/.ready
	set -e; for name in $(BENCHMARKS); do \
		$(VENV)/python benchmarks/$$name.py --short --json benchmarks/results/$$name.json; done
	$(VENV)/python benchmarks/tables.py

# RecBole and RecTools, which are compared with, each in an environment of its own.
peers: .venv-peers/.ready .venv-rectools/.ready
.venv-peers/.ready: benchmarks/peers.txt launch/stack.py
	test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python launch/stack.py torch
	.venv-peers/bin/pip install --quiet --disable-pip-version-check -r benchmarks/peers.txt
	touch $@
.venv-rectools/.ready: benchmarks/rectools.txt launch/stack.py
	test -x .venv-rectools/bin/python || $(PYTHON) -m venv .venv-rectools
	.venv-rectools/bin/python launch/stack.py torch
	.venv-rectools/bin/pip install --quiet --disable-pip-version-check -r benchmarks/rectools.txt
	touch $@

# How the code is written, in figures (tests/style.py).
style: .venv/.ready
	$(VENV)/python tests/style.py

lint: .venv/.ready
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/mypy

.venv/.ready: setup.py launch/stack.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=…")'
	test -x $(VENV)/python || $(PYTHON) -m venv .venv
	$(VENV)/python launch/stack.py install
	touch $@
