"""Second-order optimization for PyTorch, built on convolutions as tensor networks."""

__version__ = "0.1.0.dev0"
