"""Weights that layers compute from parameters, one kind per file."""
