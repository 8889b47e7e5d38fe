"""The training comparison: data, models, optimizers, runs, and what is reported of them."""
