"""The profiles of devices: one file for each, with a ``PROFILE``.

A device becomes known by its file alone; see `device_registry`.
"""
