"""The damping of the quadratic model: one rule per file, and a search for that of the inverses."""
