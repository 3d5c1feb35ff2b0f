# `make demo` and `make test` need only Python 3.11 or newer; they create .venv themselves.

# Keep .pyc files: the test workers and their subprocesses reuse them.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-long test-cluster native check docs format wheel packages bench clean

demo: .venv/.engine native
	.venv/bin/python scripts/demo

# By file, in order; a worker that dies ends the run, which names its test.
PYTEST := .venv/bin/python -m pytest --dist loadfile --no-loadscope-reorder --max-worker-restart=0

test: .venv/.dev native
	$(PYTEST) -n 4

test-long: .venv/.dev native
	$(PYTEST) -n 3 -m "(long or hypothesis) and not cluster"

# Needs root. The first time, Kubernetes, Helm and Kyverno are built: a quarter of an hour.
test-cluster: .venv/.dev native
	.venv/bin/python -m pytest -v -m cluster tests/cluster tests/deployment

# The library for CPUs, where its sources have changed since the installation.
native:
	@.venv/bin/python -m scripts.native.build

check: .venv/.dev
	scripts/check

format: .venv/.dev
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

docs: .venv/.dev
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

wheel: .venv/.dev
	scripts/check-wheel

# dist/modelpack.pyz and a Debian package, for this system and this minor version of Python.
packages: .venv/.dev
	.venv/bin/python -m scripts.packages

clean:
	rm -rf .venv .cache build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

.venv/.engine: pyproject.toml
	scripts/make-venv engine

.venv/.dev: pyproject.toml
	scripts/make-venv dev
