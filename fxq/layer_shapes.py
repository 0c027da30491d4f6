"""The shapes of weighted layers as plain data: what a layer's time depends on, besides the machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from fxq.convolutions import CHANNEL_AFFINE, conv_pads
from fxq.graph import data_inputs, float_module, kind, module_of, shape
from fxq.modules import WEIGHTED, FakeQuantize, Quantized

MOVES = ("max_pool", "reshape", "permute", "slice", "index_select")
"""Kinds that hand bits on."""
PASSING = ("batch_norm", "relu", "clamp", "leaky_relu", "prelu", "fake_quantize", *MOVES)
"""Kinds that stand between a layer and the sign that the next one reads: the sign is folded through them, or moves over them."""
BITS, TRITS, CODES, FLOAT = "bits", "trits", "codes", "float"
"""How values travel between layers: packed signs, packed signs with a mask, 8-bit codes, float32."""


@dataclass(frozen=True)
class LayerShape:
    """One weighted layer and the size of what it reads.

    Attributes:
        kind: ``conv``, ``conv_transpose`` or ``linear``.
        batch: samples; of a linear layer the rows.
        inputs, outputs: channels or features.
        kernel, stride, dilation, size: one number for each spatial dimension (``size`` of the input); empty for a linear layer.
        pads: zeros at the begin of each spatial dimension, then at the end of each.
        groups: of a convolution.
        output_padding: of a transposed convolution.
    """

    kind: str
    batch: int
    inputs: int
    outputs: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    size: tuple[int, ...] = ()
    groups: int = 1
    output_padding: tuple[int, ...] = ()

    @property
    def out_size(self) -> tuple[int, ...]:
        """Spatial size of the result."""
        n = len(self.kernel)
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]
        if self.kind == "conv_transpose":
            more = self.output_padding or (0,) * n
            return tuple((self.size[i] - 1) * self.stride[i] - self.pads[i] - self.pads[n + i] + reach[i] + more[i] for i in range(n))
        return tuple((self.size[i] + self.pads[i] + self.pads[n + i] - reach[i]) // self.stride[i] + 1 for i in range(n))

    @property
    def weight(self) -> tuple[int, ...]:
        """Shape of the weight, as torch has it."""
        if self.kind == "conv_transpose":
            return (self.inputs, self.outputs // self.groups, *self.kernel)
        return (self.outputs, self.inputs // self.groups, *self.kernel)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the whole batch."""
        pixels = math.prod(self.size if self.kind == "conv_transpose" else self.out_size)
        return self.batch * pixels * math.prod(self.weight) if self.kernel else self.batch * self.inputs * self.outputs

    def with_batch(self, batch: int) -> LayerShape:
        """The same layer on another number of samples."""
        return replace(self, batch=batch)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> LayerShape:
        """The shape of :meth:`to_json`.

        Raises:
            TypeError, ValueError: for anything else.
        """
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in plain.items()}
        made = cls(**fields)
        made._check()
        return made

    def _check(self) -> None:
        n = len(self.kernel)
        lengths = {"kernel": n, "stride": n, "pads": 2 * n, "dilation": n, "size": n, "output_padding": len(self.output_padding) and n}
        named = [(k, 0 if k in ("pads", "output_padding") else 1, getattr(self, k)) for k in lengths]
        several = all(type(v) is tuple and len(v) == lengths[k] and all(type(i) is int and i >= low for i in v) for k, low, v in named)
        single = all(type(v) is int and v > 0 for v in (self.batch, self.inputs, self.outputs, self.groups))
        if not several or not single or (n in (1, 2, 3)) != (self.kind in ("conv", "conv_transpose")) or (not n) != (self.kind == "linear"):
            raise ValueError("no such shape")

    def __str__(self) -> str:
        head = f"{self.inputs}->{self.outputs}"
        if self.kernel:
            head += f" {'x'.join(map(str, self.kernel))} @{'x'.join(map(str, self.size))}"
            head += f" stride {'x'.join(map(str, self.stride))}" if set(self.stride) != {1} else ""
            head += f" dilation {'x'.join(map(str, self.dilation))}" if set(self.dilation) != {1} else ""
            head += f" groups {self.groups}" if self.groups > 1 else ""
            head += " transposed" if self.kind == "conv_transpose" else ""
        return head + (f" batch {self.batch}" if self.batch > 1 else "")


@dataclass(frozen=True)
class Form:
    """How a layer computes on bits, and in which form its values come and go.

    Attributes:
        activations: ``binary`` or ``ternary``. weights: the same.
        reads: :data:`BITS` (or trits) where the layer before gives them packed; :data:`CODES`, :data:`FLOAT` where they are packed first.
        gives: :data:`BITS`, :data:`TRITS`, :data:`CODES` or :data:`FLOAT`.
    """

    activations: str = "binary"
    weights: str = "binary"
    reads: str = BITS
    gives: str = BITS

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Form:
        """The form of ``dataclasses.asdict``.

        Raises:
            TypeError, ValueError: for anything else.
        """
        made, two = cls(**plain), ("binary", "ternary")
        if made.activations not in two or made.weights not in two or not {made.reads, made.gives} <= {BITS, TRITS, CODES, FLOAT}:
            raise ValueError("no such form on bits")
        return made

    def __str__(self) -> str:
        return f"{self.weights} x {self.activations}, {self.reads} to {self.gives}"


def shape_of(gm: GraphModule, node: Node, samples: int = 0) -> LayerShape:
    """The shape of a weighted node.

    Args:
        gm: a canonical graph with shapes in ``node.meta``, quantized or not.
        samples: of the batch; 0 as many as the graph's example has.
    """
    source = data_inputs(node)[0]
    dynamic = source.meta.get("dynamic") or (True,)
    return module_shape(float_module(gm, node), shape(source), samples if dynamic[0] else 0)


def module_shape(op: Any, sizes: Sequence[int], samples: int = 0) -> LayerShape:
    """The shape of a conv, transposed conv or linear module.

    Args:
        op: float module. sizes: of its input. samples: in place of the input's first size; 0 as many as it has.
    """
    if isinstance(op, nn.Linear):
        rows = math.prod(sizes[:-1])
        return LayerShape("linear", max(1, rows // max(1, sizes[0]) * samples) if samples and len(sizes) > 1 else rows, op.in_features, op.out_features)
    n, turned = len(op.kernel_size), isinstance(op, nn.modules.conv._ConvTransposeNd)
    batch = samples or sizes[0] if len(sizes) == n + 2 else 1
    return LayerShape(
        "conv_transpose" if turned else "conv", batch, op.in_channels, op.out_channels, tuple(op.kernel_size), tuple(op.stride), pads_of(op),
        tuple(op.dilation), tuple(sizes[-n:]), op.groups, tuple(op.output_padding) if turned else (),
    )  # fmt: skip


def pads_of(op: Any) -> tuple[int, ...]:
    """Zeros at the begin of each spatial dimension, then at the end of each."""
    pads = [(p, p) for p in op.padding] if isinstance(op, nn.modules.conv._ConvTransposeNd) else conv_pads(op)
    return (*(int(begin) for begin, _ in pads), *(int(end) for _, end in pads))


def no_bits(op: nn.Module) -> str | None:
    """Why a conv, transposed conv or linear module has no form on bits, or ``None``."""
    if isinstance(op, nn.modules.conv._ConvTransposeNd):
        return "a transposed convolution has no kernel on bits"
    if isinstance(op, nn.Conv3d):
        return "a convolution over 3 dimensions has no kernel on bits"
    if isinstance(op, nn.modules.conv._ConvNd) and op.padding_mode != "zeros":
        return f"padding with {op.padding_mode} values has no kernel on bits"
    if isinstance(op, CHANNEL_AFFINE):
        return "a scale of each channel multiplies nothing that could be counted"
    return None


def form_of(gm: GraphModule, node: Node, like: Form | None = None) -> Form:
    """The form of a layer on bits: in a converted graph its own, in a float graph the one it would have among binary layers.

    Args:
        like: what a float graph would be made of; default binary x binary.
    """
    source = data_inputs(node)[0]
    grid = module_of(gm, source) if source.op == "call_module" else None
    if isinstance(grid, FakeQuantize) and grid.spec.kind in ("binary", "ternary"):
        return Form(grid.spec.kind, _weights(gm, node), _reads(gm, source, grid.spec.kind), _gives(gm, node))
    base = like or Form()
    packed = TRITS if base.activations == "ternary" else BITS
    reads = packed if _follows_layer(gm, source) else FLOAT if kind(gm, source) == "input" else CODES
    gives = packed if _feeds_layers(gm, node) else FLOAT if any(u.op == "output" for u in node.users) else CODES
    return Form(base.activations, base.weights, reads, gives)


def _weights(gm: GraphModule, node: Node) -> str:
    module = module_of(gm, node)
    return "ternary" if isinstance(module, Quantized) and bool((module.weight_codes() == 0).any()) else "binary"


def _reads(gm: GraphModule, grid: Node, kind_: str) -> str:
    """How the value behind a grid node comes: from the sum of a layer, packed already; from codes; from float."""
    packed = TRITS if kind_ == "ternary" else BITS
    before = data_inputs(grid)[0]
    k = kind(gm, before)
    if k == "fake_quantize":
        return CODES
    if before.meta.get("integer"):
        return packed if k in WEIGHTED or k in MOVES else CODES
    return FLOAT


def _gives(gm: GraphModule, node: Node) -> str:
    readers = [module_of(gm, u) if u.op == "call_module" else None for u in node.users]
    specs = [r.spec.kind if isinstance(r, FakeQuantize) else "" for r in readers]
    if specs and all(s == "binary" for s in specs):
        return BITS
    if specs and all(s == "ternary" for s in specs):
        return TRITS
    return CODES if specs and all(specs) else FLOAT


def _follows_layer(gm: GraphModule, node: Node) -> bool:
    while kind(gm, node) in PASSING and len(data_inputs(node)) == 1:
        node = data_inputs(node)[0]
    return kind(gm, node) in WEIGHTED and all(_ends_in_layers(gm, u) for u in node.users)


def _feeds_layers(gm: GraphModule, node: Node) -> bool:
    return bool(node.users) and all(_ends_in_layers(gm, u) for u in node.users)


def _ends_in_layers(gm: GraphModule, node: Node) -> bool:
    """Do all paths from here lead to weighted layers, through what a sign passes?"""
    k = kind(gm, node)
    return k in WEIGHTED or (k in PASSING and _feeds_layers(gm, node))


def layers_of(gm: GraphModule) -> list[Node]:
    """The weighted nodes, in the order of the graph, without those that stand in for another operation."""
    return [n for n in gm.graph.nodes if kind(gm, n) in WEIGHTED and not getattr(module_of(gm, n), "stands_in", False)]


def plain_module(shape_: LayerShape) -> nn.Module:
    """A torch layer of this shape, with zero padding that torch itself can do, and torch's initial weights.

    Padding that differs between begin and end becomes a module in front.
    """
    if shape_.kind == "linear":
        return nn.Linear(shape_.inputs, shape_.outputs)
    n = len(shape_.kernel)
    begin, end = shape_.pads[:n], shape_.pads[n:]
    name = ("ConvTranspose" if shape_.kind == "conv_transpose" else "Conv") + f"{n}d"
    options: dict[str, Any] = {"stride": shape_.stride, "dilation": shape_.dilation, "groups": shape_.groups}
    if shape_.kind == "conv_transpose":
        options["output_padding"] = shape_.output_padding or 0
    make: Any = getattr(nn, name)
    if begin == end:
        return make(shape_.inputs, shape_.outputs, shape_.kernel, padding=begin, **options)  # type: ignore[no-any-return]
    pads = [p for i in reversed(range(n)) for p in (begin[i], end[i])]
    pad: Any = (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)[n - 1]
    return nn.Sequential(pad(tuple(pads), 0.0), make(shape_.inputs, shape_.outputs, shape_.kernel, **options))
