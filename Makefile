# `make help` lists the targets. Each of the two environments is created once, and brought up to
# date when one of the files that describe it changes.

# The Python that the environments are made with.
PYTHON ?= python3
# More arguments for every `pip install`, an index for one:
#   make test PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_ARGS ?=
# Another torch than that of constraints.txt, in an environment of its own: `make test TORCH=2.15.0`, `make pytest
# TORCH=nightly`. The range in setup.cfg is not looked at.
TORCH ?=
# Arguments for the `pip install` of that torch alone.
TORCH_ARGS ?= $(if $(filter nightly,$(TORCH)),--pre --index-url https://download.pytorch.org/whl/nightly/cpu)
# More arguments for pytest, `buffer-lifting demo` and benchmarks/run.py.
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=

DEMO := .venv-demo
TEST := .venv-test$(if $(TORCH),-torch-$(TORCH))
SOURCES_OF_ENV := setup.cfg pyproject.toml constraints.txt Makefile tools/requirements.py

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Two editable installs at once would write the same metadata directory.
.NOTPARALLEL:

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

.PHONY: demo
demo: $(DEMO)/.installed ## lift a small model and show what happens, in an environment of its own
	OMP_NUM_THREADS=1 $(DEMO)/bin/buffer-lifting demo $(DEMO_ARGS)

.PHONY: test
test: lint pytest ## check format, lint and types, then run the tests (not the slow ones)

.PHONY: lint
lint: $(TEST)/.installed ## check format, lint and types only
	$(TEST)/bin/ruff format --check
	$(TEST)/bin/ruff check
	$(TEST)/bin/mypy

.PHONY: pytest
pytest: $(TEST)/.installed ## run the tests only (not the slow ones)
	OMP_NUM_THREADS=1 $(TEST)/bin/python -m pytest -n 2 $(PYTEST_ARGS)

.PHONY: test-slow
test-slow: $(TEST)/.installed ## run the slow tests
	OMP_NUM_THREADS=1 $(TEST)/bin/python -m pytest -n 2 -m slow $(PYTEST_ARGS)

.PHONY: test-browser
test-browser: $(TEST)/.installed ## run the tests of the HTML report in Chromium (needs chromium and chromedriver)
	OMP_NUM_THREADS=1 $(TEST)/bin/python -m pytest -m browser $(PYTEST_ARGS)

.PHONY: format
format: $(TEST)/.installed ## format the code, and fix what the linter can fix
	$(TEST)/bin/ruff check --fix-only
	$(TEST)/bin/ruff format

.PHONY: bench
bench: $(TEST)/.installed ## run the benchmarks
	$(TEST)/bin/python benchmarks/run.py $(BENCH_ARGS)

.PHONY: bench-feed
bench-feed: $(TEST)/.installed ## measure what feeding a step costs
	OMP_NUM_THREADS=1 $(TEST)/bin/python benchmarks/feed.py $(BENCH_ARGS)

.PHONY: bench-scale
bench-scale: $(TEST)/.installed ## measure large models on the meta device
	OMP_NUM_THREADS=1 $(TEST)/bin/python benchmarks/scale.py $(BENCH_ARGS)

.PHONY: clean
clean: ## remove the environments, caches and build products
	rm -rf $(DEMO) .venv-test .venv-test-torch-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -path ./.git -prune -o -type d -name __pycache__ -exec rm -rf {} +

$(DEMO)/.installed: EXTRAS := cli
$(TEST)/.installed: EXTRAS := test,dev

CONSTRAINTS = constraints.txt
INSTALL_TORCH = @$(@D)/bin/python -m pip install -q $(PIP_ARGS) -c $(CONSTRAINTS) torch
INSTALL_PROJECT = @$(@D)/bin/python -m pip install -q $(PIP_ARGS) -c $(CONSTRAINTS) -e ".[$(EXTRAS)]"

# The torch that was installed replaces the one in the constraints, so that no other package brings its own; and the
# project goes without its dependencies, because its range may not have that torch.
ifneq ($(TORCH),)
$(TEST)/.installed: CONSTRAINTS = $(@D)/constraints.txt
define INSTALL_OTHER_TORCH
@sed '/^torch==/d' constraints.txt > $(CONSTRAINTS)
@$(@D)/bin/python -m pip install -q $(PIP_ARGS) $(TORCH_ARGS) -c $(CONSTRAINTS) torch$(filter-out ==nightly,==$(TORCH))
@$(@D)/bin/python -m pip freeze | grep '^torch==' >> $(CONSTRAINTS)
endef
define INSTALL_PROJECT_ALONE
@$(PYTHON) tools/requirements.py $(EXTRAS) > $(@D)/requirements.txt
@$(@D)/bin/python -m pip install -q $(PIP_ARGS) -c $(CONSTRAINTS) -r $(@D)/requirements.txt
@$(@D)/bin/python -m pip install -q $(PIP_ARGS) --no-deps -e .
endef
$(TEST)/.installed: INSTALL_TORCH = $(INSTALL_OTHER_TORCH)
$(TEST)/.installed: INSTALL_PROJECT = $(INSTALL_PROJECT_ALONE)
endif

# torch goes first, by itself, in the version that constraints.txt names: while it is not there, the
# range that other packages ask for could bring the newest build, and gigabytes of CUDA with it.
$(DEMO)/.installed $(TEST)/.installed: $(SOURCES_OF_ENV)
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else \
	    f"buffer_lifting needs Python 3.11 to 3.13 and $(PYTHON) is {sys.version.split()[0]}: set PYTHON=...")'
	@echo "==> $(@D): creating the environment"
	@$(PYTHON) -m venv $(@D)
	@echo "==> $(@D): installing torch (the first time, this can take minutes)"
	$(INSTALL_TORCH)
	@echo "==> $(@D): installing buffer_lifting[$(EXTRAS)]"
	$(INSTALL_PROJECT)
	@case "$(EXTRAS)" in *test*) \
	    $(@D)/bin/python -m pip install -q $(PIP_ARGS) -c $(CONSTRAINTS) --no-deps litgpt torchtitan;; esac
	@touch $@
	@echo "==> $(@D): ready"
