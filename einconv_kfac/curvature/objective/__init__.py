"""The objective, read off the autograd graph between a model's outputs and a loss."""
