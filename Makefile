# `make demo` and `make test` need Python >= 3.11 and make: they make their own
# virtual environment in .venv from requirements.txt. `make test` needs Chromium
# as well.

VENV := .venv
PY = $(VENV)/bin/python
PIP = $(PY) -m pip install --quiet --disable-pip-version-check
# Newest first, on the PATH or where pyenv keeps them; what is missing, too old
# or without venv is passed over. 3.14, with which nothing has been run, last.
PYENV_ROOT ?= $(HOME)/.pyenv
python = python$(1) $(wildcard $(PYENV_ROOT)/versions/$(1).*/bin/python$(1))
PYTHONS ?= $(foreach v,3.13 3.12 3.11 3.14,$(call python,$(v))) python3 python
# Two processes; tests of a module stay together, as they share what is slow.
PYTEST = $(PY) -m pytest -n 2 --dist loadscope --no-loadscope-reorder
# For the error where none is found.
WANTED := >= 3.11
NAME_IT := make venv PYTHONS=/path/to/python3
MINI := --config configs/ade20k_pspnet.py:mini
# The oldest Python that is supported, and what is tried with it: goldens, steps,
# the scripts, and the places where versions differ.
OLDEST := 3.11
OLDEST_PYTHONS ?= $(call python,$(OLDEST))
OLDEST_TESTS := tests/models/test_golden_forward.py \
  tests/models/test_classifier.py tests/models/test_nnx.py \
  tests/training/test_golden.py tests/training/test_step.py \
  tests/checkpoints/test_store.py tests/checkpoints/test_resuming.py \
  tests/evaluation/test_evaluate.py tests/inference/test_protocols.py \
  tests/evaluation/test_metrics.py tests/evaluation/test_eval.py \
  tests/prediction/test_files.py tests/export/test_exports.py \
  tests/export/test_class_exports.py tests/export/test_features.py \
  tests/export/test_folding.py tests/weights/test_convert.py \
  tests/data/test_prepare.py tests/data/test_opencv.py tests/test_train.py \
  tests/test_scripts.py tests/test_commands.py tests/test_jax_private.py

.DELETE_ON_ERROR:
.PHONY: help venv demo test test-long test-oldest test-some browser docs lint bench clean

help:
	@echo 'make demo   make a small ADE20K, train, evaluate, draw pictures (demo/)'
	@echo 'make test   code style and the tests'
	@echo 'make test-long  the tests that make test leaves to CI'
	@echo 'make test-oldest  goldens, steps and scripts with Python $(OLDEST) (.venv-oldest)'
	@echo 'make venv   the environment alone (.venv)'
	@echo 'make docs   these pages and the docstrings as a site (site/)'
	@echo 'make lint   code style alone'
	@echo 'make bench  time the training step of the small config'
	@echo 'make clean  remove demo/, site/ and all caches (no environment)'

# Written last, so that a half-made environment is made again from scratch.
$(VENV)/installed: requirements.txt
	@for python in $(PYTHONS); do \
	  if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	  then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo 'error: no Python $(WANTED) with the venv module among: $(PYTHONS).' \
	    'Install one (Debian, Ubuntu: apt install python3-venv) or name it:' \
	    '$(NAME_IT)' >&2; exit 1; \
	fi; \
	echo "making $(VENV) with $$($$found --version) (some minutes)"; \
	$$found -m venv --clear $(VENV)
	$(PIP) -r requirements.txt
	$(PIP) --no-deps -e .
	@touch $@

$(VENV)/testable: $(VENV)/installed requirements-test.txt requirements-onnx.txt
	$(PIP) -r requirements-test.txt
	$(PIP) --no-deps -r requirements-onnx.txt
	@touch $@

venv: $(VENV)/installed

# Each step continues or reuses what an earlier, interrupted run left.
demo: $(VENV)/installed
	$(PY) -m resnest_jax.data.prepare ade20k_mini --data_dir demo/data
	$(PY) train.py $(MINI) --config.data.data_dir=demo/data --workdir demo/run
	$(PY) eval.py $(MINI) --config.data.data_dir=demo/data --workdir demo/run
	@echo 'pictures:'; find demo/run -name '*.png' | sort | sed 's/^/  /'

test: browser lint $(VENV)/testable
	$(PYTEST) -m 'not long'

# Whole trainings, several processes, and the other heads and backbones of tests
# that take long for each.
test-long: browser $(VENV)/testable
	$(PYTEST) -m long

test-oldest:
	@$(MAKE) --no-print-directory VENV=.venv-oldest \
	  PYTHONS='$(OLDEST_PYTHONS)' WANTED=$(OLDEST) \
	  NAME_IT='make test-oldest OLDEST_PYTHONS=/path/to/python$(OLDEST)' \
	  TESTS='$(OLDEST_TESTS)' test-some

test-some: $(VENV)/testable
	$(PYTEST) -m 'not long' $(TESTS)

# Chromium, which root's Debian is given and others are told to install.
browser:
	@tests/find_browser.sh

docs: $(VENV)/testable
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
	@echo 'open site/index.html, or for its search: $(PY) -m mkdocs serve'

lint: $(VENV)/installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

bench: $(VENV)/installed
	$(PY) benchmarks/train_step.py $(MINI)

clean:
	rm -rf demo site dist build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
