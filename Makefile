PYTHON ?= python3
BIN := .venv/bin

.PHONY: poem help base test test-slow clean

poem: .venv/installed  ## prepare Shakespeare and Alice, train config/demo.yaml, write a passage
	$(BIN)/python prepare.py data/robopoet
	$(BIN)/python train.py config/demo.yaml --init_from=auto
	$(BIN)/python sample.py --checkpoint=out/demo/best.pt --style=shakespeare --prompt='JULIET\n'

base: .venv/installed  ## fetch SmolLM2, a model that knows English, for your own books to start from
	$(BIN)/python sample.py smollm2 --prompt='Once upon a time' --max_new_tokens=60

test: .venv/installed-dev  ## lint, check types, then the fast tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --python-interpreter-path=$(BIN)/python
	$(BIN)/python -m pytest -n 3 -m "not slow"

test-slow: .venv/installed-slow  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

clean:  ## remove what `make` made; your own runs and data stay
	rm -rf .venv out/demo out/base
	rm -rf $(foreach d,robopoet base smollm2,data/$(d)/raw data/$(d)/*.bin data/$(d)/meta.json)

help:  ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1: \2/p' Makefile

.venv/installed: requirements.txt requirements-light.txt
	$(call install,requirements.txt)

.venv/installed-dev: requirements-dev.txt requirements.txt requirements-light.txt
	$(call install,requirements-dev.txt)
	touch .venv/installed

.venv/installed-slow: requirements-slow.txt .venv/installed-dev
	$(call install,requirements-slow.txt)
	grep -o '^chardet==[^ ]*' requirements.txt | $(BIN)/pip install --no-deps -r /dev/stdin  # lm_eval brings an older one

# pip compiles on one core; compileall on all. It fails on templates that are not Python: so does pip, without a word.
define install
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install --no-compile --disable-pip-version-check -r $(1)
	$(BIN)/python -m compileall -qq -j 0 .venv/lib || true
	touch $@
endef
