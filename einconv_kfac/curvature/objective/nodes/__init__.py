"""One file per structure of nonlinear operations; `node_registry` finds every rule here."""
