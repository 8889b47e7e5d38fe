"""How far to go: step size, damping, momentum."""
