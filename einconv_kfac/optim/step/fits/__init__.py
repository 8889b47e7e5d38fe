"""The quadratic model of a step in a subspace, and its minimum."""
