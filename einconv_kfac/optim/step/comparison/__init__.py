"""What a step has changed against what was predicted, and what follows from it."""
