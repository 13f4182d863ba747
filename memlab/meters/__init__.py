"""Where the ledger's bytes come from: one file a source (`cpu`, `cuda`), and one that sees what
they are (`columns`).
"""
