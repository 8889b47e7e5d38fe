"""Forward passes, recorded and run again, and Jacobian-vector products."""
