"""Backends: one backend, one file."""

if __name__ != "fxq.backends":
    raise ImportError("import fxq.backends, not backends")
