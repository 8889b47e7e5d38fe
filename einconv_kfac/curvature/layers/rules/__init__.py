"""One rule per file, for one type of layer or several that compute alike.

`layer_registry` finds every rule here by its ``kinds``, and the tests walk its ``examples``.
"""
