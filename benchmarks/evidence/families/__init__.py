"""Families of tasks: data, loss and test of one kind per file."""
