"""The operators: pure functions on tensors.

Lives here: KDA, the short convolution, MLA's two forms, expert dispatch and grouped products,
norms, and the table that says which implementation runs where.
May import: ``deltamoe.errors``. No module, no configuration, no state class.
Read first: ``kda/reference.py``, which is the definition the fast code is tested against.
"""
