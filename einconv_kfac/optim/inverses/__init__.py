"""Damped inverses of a layer's curvature, one kind per file.

A file of this folder that defines ``KIND``, a `Kind`, adds a kind of inverse: ``inverse=`` then
takes its name.
"""
