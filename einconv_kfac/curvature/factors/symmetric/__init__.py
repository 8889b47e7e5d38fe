"""Writing factors that are symmetric to the last bit."""
