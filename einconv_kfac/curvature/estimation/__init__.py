"""Estimates of curvature for a model, a loss and data, by hooks and backward passes."""
