"""The training comparison: data, models, optimizers, search, runs, and report."""
