"""Layers with a block of curvature: rules by type of module, and the layers of a model."""
