PYTHON ?= python
.PHONY: install test format lint types dist example benchmark training step fractions growth ci clean

install: ## the package, editable, with all that development needs
	$(PYTHON) -m pip install -e ".[test,lint]"

test: ## the test suite
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

dist: ## build wheel and sdist, and check what they contain
	rm -rf build dist
	$(PYTHON) -m pip install build
	$(PYTHON) -m build
	$(PYTHON) .ci/check_dist.py dist

example: ## train on the digits
	$(PYTHON) examples/train_digits.py

benchmark: ## the digits over several seeds, with searched learning rates
	$(PYTHON) benchmarks/digits.py

training: ## KFAC beside tuned peers on Fashion-MNIST; more than an hour, continues where it was cut
	OMP_NUM_THREADS=1 $(PYTHON) benchmarks/training.py

step: ## the cost of a step on ResNet-18
	OMP_NUM_THREADS=1 $(PYTHON) benchmarks/step.py

fractions: ## the cost of a step on a part of the examples
	OMP_NUM_THREADS=1 $(PYTHON) benchmarks/fractions_of_batches.py

growth: ## what a thousand steps leave behind
	OMP_NUM_THREADS=1 $(PYTHON) benchmarks/growth.py

ci: ## everything that must pass, in fresh environments
	bash .ci/run

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
