"""Recording of forward passes, their replay, and Jacobian-vector products."""
