"""The archive format ``.fxq``: entropy-coded tensors and a graph in one safetensors file (``docs/archive.md``). numpy only, no torch."""

from fxq.archive import fast as fast
