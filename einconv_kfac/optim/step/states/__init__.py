"""What of an optimizer is saved, loaded and restored."""
