PYTHON ?= python
ONE_THREAD = OMP_NUM_THREADS=1 $(PYTHON)
.DEFAULT_GOAL := help
.PHONY: help install test format lint types surface docs dist smoke example ci clean \
	bench-digits bench-training bench-step bench-step-operations bench-fractions \
	bench-communication bench-large-batch bench-growth bench-trace bench-factors bench-threads \
	bench-regions bench-profile \
	bench-operations bench-curvature gpu

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: ## install the package, editable, with all that development needs
	$(PYTHON) -m pip install -e ".[test,lint]"

test: ## run the test suite
	$(PYTHON) -m pytest

format: ## rewrite the code in the house format
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

lint: ## check format and lint
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .

types: ## check types, with two checkers
	$(PYTHON) -m mypy --strict
	$(PYTHON) -m pyrefly check

surface: ## rewrite the list of public names and signatures
	$(PYTHON) tests/test_public_surface.py --write

docs: ## build the documentation site into build/site, strictly; needs the extra `docs`
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

dist: ## build wheel and sdist, and check their metadata and files
	rm -rf build dist
	$(PYTHON) -m pip install build twine
	$(PYTHON) -m build
	$(PYTHON) -m twine check --strict dist/*
	$(PYTHON) .ci/check_dist.py dist

smoke: dist ## use the wheel in a fresh environment, away from the checkout
	PYTHON=$(PYTHON) bash .ci/try_wheel dist

example: ## train on the digits with KFAC, SGD and AdamW
	$(PYTHON) examples/train_digits.py

bench-digits: ## compare optimizers on the digits over ten seeds, peers with searched learning rates
	$(PYTHON) benchmarks/digits.py

bench-training: ## compare KFAC with tuned peers on Fashion-MNIST; takes hours, can be continued
	$(ONE_THREAD) benchmarks/training.py

bench-step: ## time a training step on ResNet-18
	$(ONE_THREAD) benchmarks/step.py

bench-step-operations: ## count the operations that a step on ResNet-50 starts
	$(ONE_THREAD) benchmarks/step_operations.py

bench-fractions: ## time a step whose curvature comes from a part of the examples
	$(ONE_THREAD) benchmarks/fractions_of_batches.py

bench-communication: ## record what several workers send each other in a step
	$(ONE_THREAD) benchmarks/communication.py

bench-large-batch: ## count steps to a loss for batches of 64 to 8,192 examples
	$(ONE_THREAD) benchmarks/large_batch.py

bench-growth: ## count memory, tensors, graph nodes and hooks after up to a thousand steps
	$(ONE_THREAD) benchmarks/growth.py

bench-trace: ## count how often a step changes file
	$(ONE_THREAD) benchmarks/step_trace.py

bench-threads: ## time factors on one thread and on two
	$(PYTHON) benchmarks/factor_threads.py

bench-regions: ## count the operations of factors that wait for threads
	$(ONE_THREAD) benchmarks/factor_regions.py

bench-factors: ## time the input factors of the layers of real networks
	$(ONE_THREAD) benchmarks/factors.py

bench-profile: ## compare the time of the factors with what no exact method can avoid
	$(ONE_THREAD) benchmarks/factor_profile.py

bench-operations: ## time convolutions against torch and einconv
	$(ONE_THREAD) benchmarks/operations.py --output benchmarks/results/operations.txt

bench-curvature: ## time the factors of whole models against other libraries
	$(ONE_THREAD) benchmarks/curvature.py

gpu: ## measure and test on a GPU, within ten minutes a call; call it again until nothing is new
	$(PYTHON) -m pytest -q -n 0 tests/cuda
	$(PYTHON) benchmarks/gpu.py

ci: ## run everything that must pass, in fresh environments
	bash .ci/run

clean: ## remove what building and testing leave behind
	rm -rf build dist *.egg-info .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis
