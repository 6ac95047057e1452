# The developer's manual: `make demo`, `make test`, `make lint`, `make bench`, `make bench-llm`.
# Everything runs in .venv, which is made once and again when the dependencies change.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# uv takes minutes off a fresh install, but reads none of pip's configuration: hand it the wheel folders, else let pip do it.
# Compiled ahead, because where Python may not write its bytecode every process would compile every library again, and Fairlead itself.
FIND_LINKS := $(foreach place,$(PIP_FIND_LINKS),--find-links $(place))
TORCH := 2.13.0

.PHONY: demo test compiled lint format bench bench-llm engines venv constraints clean

demo: compiled  ## train small real models, serve them, ask each one
	$(BIN)/fairlead demo $(ARGS)

test: lint compiled  ## what CI runs
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)  ## Fairlead and its peers side by side, each in its own environment
	bash benchmarks/tensors/bench.sh $(ARGS)

bench-llm: $(INSTALLED)  ## the same for language models
	bash benchmarks/llm/setup.sh
	$(BIN)/python benchmarks/llm/bench.py $(ARGS)

engines:  ## engines of others for `backend: vllm`, each in an environment of its own: .engines (`FAIRLEAD_TEST_ENGINES=1 make test` tries them)
	bash engines.sh

venv: $(INSTALLED)

compiled: $(INSTALLED)
	$(BIN)/python -m compileall -q src

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --python $(BIN)/python --compile-bytecode $(FIND_LINKS) -c constraints.txt -e '.[dev]' \
		|| $(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	$(BIN)/python -m fairlead.llm.kernels
	touch $@

constraints: $(INSTALLED)  ## pin the newest versions that fit pyproject.toml, on every platform
	echo torch==$(TORCH) > $(VENV)/torch.txt
	$(BIN)/uv pip compile --quiet --upgrade --universal --all-extras --no-annotate --no-header \
		--python-version 3.11 -c $(VENV)/torch.txt pyproject.toml -o constraints.txt

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis dist build demo-models
