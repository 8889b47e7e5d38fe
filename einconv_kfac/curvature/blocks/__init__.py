"""Blocks of curvature as immutable values: products, inverses, traces, sums.

A type of block is a file whose class implements `Block`.
"""
