"""Shapes by running the graph on the meta device at two batch sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_map

from fxq.graph import compare_shapes, tree_shape
from fxq.modules import kind_of

SAME_SHAPE = frozenset(
    "batch_norm layer_norm group_norm instance_norm relu clamp leaky_relu prelu elu selu sigmoid hardsigmoid hardswish silu mish tanh gelu "
    "softplus softmax log_softmax fake_quantize".split()
)


def plain(a: Any) -> Any:
    """fx's immutable containers as Python's own: traced functions may change their arguments."""
    if isinstance(a, list):
        return [plain(v) for v in a]
    if isinstance(a, dict):
        return {k: plain(v) for k, v in a.items()}
    if isinstance(a, slice):
        return slice(plain(a.start), plain(a.stop), plain(a.step))
    return tuple(plain(v) for v in a) if type(a) is tuple else a


def _layer_sizes(module: Any, *args: Any) -> tuple[int, ...] | None:
    """Output sizes of a plain convolution or linear layer; ``None`` for anything else, and for inputs that it may refuse."""
    if len(args) != 1 or not isinstance(args[0], Tensor) or type(module) not in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return None
    sizes = args[0].shape
    if args[0].dtype != module.weight.dtype:
        return None
    if type(module) is nn.Linear:
        return (*sizes[:-1], module.out_features) if sizes and sizes[-1] == module.in_features else None
    k = len(module.kernel_size)
    if module.padding_mode != "zeros" or isinstance(module.padding, str) or len(sizes) not in (k + 1, k + 2) or sizes[-k - 1] != module.in_channels:
        return None
    taps = zip(sizes[-k:], module.kernel_size, module.stride, module.padding, module.dilation, strict=True)
    out = [(n + 2 * p - d * (w - 1) - 1) // s + 1 for n, w, s, p, d in taps]
    return (*sizes[: -k - 1], module.out_channels, *out) if min(out) > 0 else None


class _Record(Interpreter):
    """Keeps every value. On the meta device layers whose output sizes are known without are not run: torch's decompositions are slow there."""

    def __init__(self, gm: GraphModule, meta: bool) -> None:
        super().__init__(gm)
        self.seen: dict[Node, Any] = {}
        self.meta = meta

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.meta and not kwargs:
            module = self.fetch_attr(target)
            if kind_of(module) in SAME_SHAPE:
                return torch.empty_like(args[0])
            sizes = _layer_sizes(module, *args)
            if sizes is not None:
                return torch.empty(sizes, dtype=args[0].dtype, device="meta")
        return super().call_module(target, args, kwargs)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return super().call_function(target, plain(args), plain(kwargs))

    def run_node(self, n: Node) -> Any:
        out = super().run_node(n)
        self.seen[n] = out
        return out


def _run(gm: GraphModule, inputs: tuple[Any, ...]) -> dict[Node, Any]:
    meta = {k: v.to("meta") for k, v in [*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False)]}
    recorder = _Record(gm, True)
    with torch.no_grad(), torch.nn.utils.stateless._reparametrize_module(gm, meta):
        recorder.run(*tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, inputs))
    return recorder.seen


def _real(gm: GraphModule, inputs: tuple[Any, ...]) -> dict[Node, Any]:
    recorder = _Record(gm, False)
    with torch.inference_mode():
        recorder.run(*inputs)
    return recorder.seen


def propagate(gm: GraphModule, example: tuple[Any, ...]) -> None:
    """Set ``shape``, ``dynamic``, ``dtype`` (tensors) or ``value``, ``dynamic`` (numbers) in every node's meta.

    A graph that fails at a second batch size is specialised: nothing is dynamic.
    """
    more = tree_map(lambda x: torch.cat([x, x[:1]]) if isinstance(x, Tensor) and x.ndim else x, example)
    try:
        one, run = _run(gm, example), _run
    except Exception:
        one, run = _real(gm, example), _real
    try:
        two = run(gm, more)
    except Exception:
        two = one
    home = next((x.device for x in example if isinstance(x, Tensor)), torch.device("cpu"))
    for node, value in one.items():
        if node.op == "output":
            continue
        other = two[node]
        for key in ("value", "other"):
            node.meta.pop(key, None)
        if _is_plain(value):
            node.meta.update(value=_as_python(value, home), other=_as_python(other, home), shape=None, dtype=None, dynamic=value != other)
            continue
        node.meta.update(shape=tree_shape(value), dynamic=compare_shapes(tree_shape(value), tree_shape(other)))
        node.meta["dtype"] = [getattr(v, "dtype", None) for v in value] if isinstance(value, (tuple, list)) else getattr(value, "dtype", None)


def _is_plain(value: Any) -> bool:
    """Numbers, names, types and sequences of them: no tensor."""
    if isinstance(value, (tuple, list)):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, (int, float, bool, str, torch.dtype, torch.device, torch.memory_format, torch.layout))


def _as_python(value: Any, home: torch.device) -> Any:
    """``torch.Size`` as a tuple, and the meta device as the one that the graph's inputs are on."""
    if isinstance(value, torch.device) and value.type == "meta":
        return home
    return tuple(_as_python(v, home) for v in value) if isinstance(value, tuple) else value
