"""Passes: one pass, one file."""

if __name__ != "fxq.passes":
    raise ImportError("import fxq.passes, not passes")
