"""Conversions between this package's curvature and other libraries.

A file per library. It imports its library, which is an extra of the installation, and raises an
``ImportError`` with the install line where that is missing; no other room imports these files. A
library that the tests use as an oracle only, or a benchmark as a competitor, does not belong here.
"""
