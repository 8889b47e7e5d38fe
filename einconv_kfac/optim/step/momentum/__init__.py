"""The slow momentum and its gains by layer."""
