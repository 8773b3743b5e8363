# Every target does its own set-up: a virtual environment in .venv with the versions of constraints.txt.
#   make demo [SEED=1] [ARGS=...]   fit the bundled model, compare with KVP and heuristics (5 minutes); runs/demo/
#   make test                       the test suite
#   make test-all                   the test suite and the slow tests
#   make lint                       ruff and mypy
#   make docs                       the documentation site, in site/
#   make versions                   the live tests under transformers 5.2, 5.4 and the newest; in .versions/
#   make kvpress                    the tests with kvpress, in .venv-kvpress (1.4 GB): kvpress needs transformers 5.2
#   make clients                    docs/clients.md: what other libraries do with the package, run in .venv-clients
#   make ray                        the tests with a Ray cluster of this machine; ray (70 MB) in .venv
#   make real-model  a small real language model (SmolLM2-135M-Instruct, a 4-bit copy) in runs/models/
#   make clean                      removes environments, caches and build folders; runs/ stays
PYTHON ?= python3
SEED ?=
ARGS ?=

BIN := .venv/bin
READY := .venv/ready
DOCS := .venv/docs
BESIDE := .venv-kvpress/ready
CLIENTS := .venv-clients/ready

.PHONY: demo test test-all lint docs versions kvpress clients ray real-model clean
.DEFAULT_GOAL := test

demo: $(READY)
	$(BIN)/kv-gym demo $(if $(SEED),--seed $(SEED)) $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -n auto --dist loadfile

# after `test`, never beside it
test-all: test
	$(BIN)/python -m pytest -m slow

lint: $(READY)
	$(BIN)/ruff check --output-format concise .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

versions: $(READY)
	@$(BIN)/python tests/versions.py

kvpress: $(BESIDE)
	OMP_NUM_THREADS=1 .venv-kvpress/bin/python -m pytest -c tests/kvpress/pytest.ini tests/kvpress

clients: $(CLIENTS)
	OMP_NUM_THREADS=1 .venv-clients/bin/python benchmarks/clients.py --json benchmarks/results/clients.json

ray: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt 'ray'
	$(BIN)/python -m pytest -m slow tests/test_worker_results.py

real-model: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt 'accelerate' 'gguf'
	$(BIN)/python benchmarks/get_real_model.py

clean:
	rm -rf .venv .venv-kvpress .venv-clients .versions site build dist kv_gym.egg-info .pytest_cache .mypy_cache .ruff_cache
	find kv_gym tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so an interrupted set-up starts over and a changed dependency installs again.
$(READY): setup.cfg setup.py pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "kv_gym needs Python 3.11 or newer and found no $(PYTHON): install it, or name it with make PYTHON=/path/to/python3" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "kv_gym needs Python 3.11 or newer and $(PYTHON) is $$($(PYTHON) -V 2>&1): name a newer one with make PYTHON=/path/to/python3" >&2; exit 2; }
	@$(BIN)/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv || { echo "$(PYTHON) cannot make a virtual environment: install its venv module (python3-venv on Debian and Ubuntu)" >&2; exit 2; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@# compat: a plain path, so that a folder of the clone's name beside the user's script does not hide the package
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --config-settings editable_mode=compat -e '.[dev]'
	@touch $@

$(DOCS): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --config-settings editable_mode=compat -e '.[docs]'
	@touch $@

# not with constraints.txt: some of these libraries want other versions of what they share
$(CLIENTS): benchmarks/clients.txt benchmarks/clients_constraints.txt setup.cfg $(READY)
	@.venv-clients/bin/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m venv --clear .venv-clients
	.venv-clients/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --config-settings editable_mode=compat -c benchmarks/clients_constraints.txt -r benchmarks/clients.txt -e '.[datasets,lm-eval,ray]'
	@touch $@

$(BESIDE): tests/kvpress/constraints.txt setup.cfg $(READY)
	@.venv-kvpress/bin/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m venv --clear .venv-kvpress
	.venv-kvpress/bin/python -m pip install --quiet --disable-pip-version-check -c tests/kvpress/constraints.txt torch
	.venv-kvpress/bin/python -m pip install --quiet --disable-pip-version-check -c tests/kvpress/constraints.txt --config-settings editable_mode=compat kvpress pytest pytest-timeout -e .
	@touch $@
