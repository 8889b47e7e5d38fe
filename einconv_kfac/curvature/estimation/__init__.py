"""From a model, a loss and data to sums over examples, by hooks and backward passes."""
