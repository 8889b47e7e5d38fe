"""One rule per file, for one type of loss or several of the same structure.

`loss_registry` finds every rule here by its ``kinds``, and the tests walk its ``examples``.
"""
