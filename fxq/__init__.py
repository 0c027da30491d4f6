"""fxq: a graph-rewriting quantization compiler on torch.fx."""

__version__ = "0.1.0"
