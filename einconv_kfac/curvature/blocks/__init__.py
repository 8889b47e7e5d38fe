"""Blocks of curvature as values: products, inverses, traces, sums."""
