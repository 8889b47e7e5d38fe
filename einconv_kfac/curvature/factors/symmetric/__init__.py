"""Writing a factor so that it is symmetric to the last bit."""
