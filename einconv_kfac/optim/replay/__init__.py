"""Recorded forward passes, run again, and Jacobian-vector products."""
