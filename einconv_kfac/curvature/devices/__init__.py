"""What a device is good at, and which library multiplies on it."""
