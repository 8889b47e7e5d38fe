"""Damped inverses of a layer's curvature, one kind per file."""
