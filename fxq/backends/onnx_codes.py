"""Values onto their grids: QuantizeLinear, Clip for grids of less than 256 codes, signs, and the DequantizeLinear that readers take.

ONNX Runtime fuses 8-bit codes. A narrower grid is held in unsigned bytes that count from its least code: below, they saturate by themselves; above, a
Clip between QuantizeLinear and DequantizeLinear ends the grid. The runtime fuses the layers on both sides as ever and keeps the Clip between them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxq import numerics
from fxq.backends.onnx_writer import Writer, constant, quantizer
from fxq.graph import kind, shape
from fxq.kernels import gives_sign, keeps_grid
from fxq.spec import QParams, QuantSpec

HARD_SIGMOID_WIDTH = 6.0
BYTES = QuantSpec.parse("u8/pt")


def filed(qp: QParams) -> QParams:
    """An activation's grid as the file holds it: unsigned 8-bit codes unless the grid uses its bits in full."""
    return qp if numerics.top_code(qp.spec) is None else numerics.in_bytes(qp)


def read_grid(gm: GraphModule, fq: Node) -> QParams:
    """Grid of the DequantizeLinear behind a ``fake_quantize`` node, as the file holds it."""
    return filed(quantizer(gm, fq).qparams)


def written_grid(gm: GraphModule, fq: Node, fused: bool) -> QParams:
    """Grid of the QuantizeLinear of a ``fake_quantize`` node, as the file holds it.

    It differs from :func:`read_grid` where values are rounded with another step than the codes' readers multiply by, behind a hard sigmoid (the saturating
    sum ``x + 3`` on a grid six times as wide), and for the sign of an integer layer: that is written with weights of scale 1, so that one step of
    the sum is one step of this grid, and saturates.

    Args:
        fused: the target fuses Q/DQ to integer kernels.
    """
    source, qp = fq.all_input_nodes[0], filed(quantizer(gm, fq).rounding)
    if fused and gives_sign(gm, source):
        return QParams(qp.spec, quantizer(gm, source.all_input_nodes[0]).scale, qp.zero_point)
    if kind(gm, source) == "hardsigmoid" and source.meta.get("integer"):
        return QParams(qp.spec, qp.scale * HARD_SIGMOID_WIDTH, qp.zero_point)
    return qp


def stored_codes(x: Tensor, qp: QParams) -> Tensor:
    """Codes of the float tensor ``x`` on the grid ``qp``, as the file holds them."""
    codes = numerics.quantize(x, qp)
    return codes if numerics.top_code(qp.spec) is None else (codes.to(torch.int32) - qp.spec.qmin).to(torch.uint8)


def fake_quantize(w: Writer, node: Node) -> None:
    """Write a ``fake_quantize`` node: the codes ``<path>`` of its input, and ``<path>/dq`` when a reader wants the values."""
    path, source, qp = w.codes(node), node.all_input_nodes[0], quantizer(w.gm, node).qparams
    s, z = w.grid(path, filed(qp))
    axis = {} if qp.spec.axis is None else {"axis": qp.spec.axis}
    if source.op == "get_attr":
        w.const(path, stored_codes(constant(w.gm, source), quantizer(w.gm, node).rounding))
    elif source not in w.nodes_on_codes:
        _codes(w, node, path, s, axis)
    w.later(node, lambda: w.op("DequantizeLinear", [path, s, z], f"{path}/dq", **axis))


def _codes(w: Writer, node: Node, path: str, scale: str, axis: dict[str, int]) -> None:
    fq, source, fused = quantizer(w.gm, node), node.all_input_nodes[0], w.target.fused
    top = None if keeps_grid(w.gm, node) else numerics.top_code(fq.spec)
    if fq.spec.kind == "binary" and top is not None and not (fused and gives_sign(w.gm, source)):
        _sign(w, node, path)
        return
    grid = written_grid(w.gm, node, fused)
    zero = f"{path}_zero"
    if not grid.same_grid(filed(fq.qparams)):
        scale, zero = w.grid(f"{path}/wide", grid)
    value = _fixed(w, source)
    if top is None:
        w.op("QuantizeLinear", [value, scale, zero], path, **axis)
        return
    w.op("QuantizeLinear", [value, scale, zero], f"{path}/wide", **axis)
    _clip(w, path, top)


def _fixed(w: Writer, source: Node) -> str:
    """The value of ``source``; of a float max pool behind a leaky ReLU of slope 1, which changes nothing.

    ONNX Runtime would move the QuantizeLinear in front of the pool, whose integer kernel is 20 times slower than the float one unless an integer
    convolution stands before it.
    """
    name = w.name(source)
    if not w.target.fused or kind(w.gm, source) != "max_pool" or source.meta.get("integer") or source.meta["dtype"] != torch.float32:
        return name
    out = f"{w.out(source)}/float"
    return out if any(n.output[0] == out for n in w.nodes) else w.op("LeakyRelu", [name], out, alpha=1.0)


def _clip(w: Writer, path: str, top: int) -> None:
    """The codes ``path``: those of ``path/wide`` up to ``top``."""
    w.op("Clip", [f"{path}/wide", "", w.const(f"{path}_top", torch.tensor(top, dtype=torch.uint8))], path)


def _sign(w: Writer, node: Node, path: str) -> None:
    """Codes of a binary grid, 0 and 2: 2 where the value is 0 or above (of NaN 0).

    On 8-bit codes ``c`` it is an integer sum, which is never 0 and saturates: ``2 (c - z) + 1`` (of codes two steps are one of its grid, whatever their
    scale is). It takes less than half the time of a comparison in float.
    """
    source, top = node.all_input_nodes[0], numerics.top_code(QuantSpec.parse("b1/pt"))
    assert top is not None
    if kind(w.gm, source) == "fake_quantize" and (on := read_grid(w.gm, source)).spec == BYTES:
        unit = QParams(BYTES, torch.tensor(1.0), torch.tensor(0, dtype=torch.int32))
        twice = w.op("DequantizeLinear", [w.codes(source), *w.grid(f"{path}/twice", QParams(BYTES, unit.scale * 2, on.zero_point))], f"{path}/twice")
        one = w.const(f"{path}/one_q", torch.ones([1] * len(shape(node)), dtype=torch.uint8))
        odd = w.op("Add", [twice, w.op("DequantizeLinear", [one, *w.grid(f"{path}/one", unit)], f"{path}/one")], f"{path}/odd")
        w.op("QuantizeLinear", [odd, *w.grid(f"{path}/wide", filed(quantizer(w.gm, node).qparams))], f"{path}/wide")
        _clip(w, path, top)
        return
    zero = w.const(f"{path}/threshold", torch.zeros((), dtype=source.meta["dtype"]))
    ends = [w.const(f"{path}/{k}", torch.tensor(v, dtype=torch.uint8)) for k, v in (("positive", top), ("negative", 0))]
    w.op("Where", [w.op("GreaterOrEqual", [w.name(source), zero], f"{path}/positive_or_zero"), *ends], path)
