"""Profiles of devices, and products of matrices by the library that is fastest on each."""
