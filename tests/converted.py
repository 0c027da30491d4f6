"""Converted graphs by hand: canonical modules, fake-quantizers and quantized layers, with grids measured on one batch."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node, Tracer
from torch.fx.node import map_arg

from fxq import numerics
from fxq.backends.onnx_qdq import OnnxQdq
from fxq.graph import kind, module_of, swap_module
from fxq.modules import WEIGHTED, FakeQuantize, Quantized, kind_of
from fxq.schemes import get as scheme
from fxq.shapes import propagate
from fxq.spec import QParams, QuantSpec
from fxq.targets import get as target


def fq(like: FakeQuantize | None = None, spec: str = "u8/pt") -> FakeQuantize:
    """A fake-quantizer whose grid :func:`converted` measures, or the grid of ``like``."""
    out = FakeQuantize(QParams(QuantSpec.parse(spec), torch.tensor(1.0), torch.tensor(0, dtype=torch.int32)))
    out.__dict__["like"] = like  # not a submodule
    return out


class _Tracer(Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return kind_of(m) != "opaque" or super().is_leaf_module(m, module_qualified_name)


def converted(model: nn.Module, *inputs: Tensor, floats: tuple[str, ...] = (), shrink: float = 0.8) -> GraphModule:
    """Trace, measure the grids (to ``shrink`` of the range, so that codes saturate) and quantize conv and linear layers.

    Nodes named in ``floats`` are not marked integer; layers without a fake-quantizer before them stay float.
    """
    gm = GraphModule(model, _Tracer().trace(model.eval()), type(model).__name__).eval()
    env: dict[Node, Any] = {}
    given = iter(inputs)
    with torch.no_grad():
        for n in gm.graph.nodes:
            n.meta["integer"] = n.op not in ("placeholder", "output", "get_attr") and n.name not in floats
            args = map_arg(n.args, env.__getitem__)
            if n.op == "placeholder":
                env[n] = next(given)
            elif n.op == "get_attr":
                env[n] = getattr(gm, str(n.target))
            elif n.op == "call_function":
                env[n] = n.target(*args)  # type: ignore[operator]
            elif n.op == "call_module":
                _measure(gm, n, args, shrink)
                env[n] = module_of(gm, n)(*args)
    propagate(gm, inputs)
    return gm


def _measure(gm: GraphModule, n: Node, args: Any, shrink: float) -> None:
    module: Any = module_of(gm, n)
    if isinstance(module, FakeQuantize):
        n.meta["grid"] = str(n.target)
        source = n.all_input_nodes[0]
        if kind(gm, source) == "hardsigmoid" and source.meta["integer"]:
            qp = QParams(module.spec, torch.tensor(1 / (module.spec.qmax - module.spec.qmin)), torch.tensor(module.spec.qmin, dtype=torch.int32))
        elif module.like is not None:
            qp = module.like.qparams
        else:
            qp = numerics.choose_qparams(args[0].min() * shrink, args[0].max() * shrink, module.spec)
        module.scale, module.zero_point = qp.scale, qp.zero_point
    elif kind(gm, n) in WEIGHTED and kind(gm, n.all_input_nodes[0]) == "fake_quantize" and n.meta["integer"]:
        a: Any = module_of(gm, n.all_input_nodes[0])
        w = module.weight.detach().flatten(1)
        qp = numerics.choose_qparams(w.amin(1), w.amax(1), QuantSpec.parse("s8n/pc0"))
        swap_module(gm, n, Quantized(module, qp, None if module.bias is None else numerics.bias_qparams(a.qparams, qp)))


def onnx_bytes(gm: GraphModule) -> bytes:
    """The graph's ONNX file."""
    return OnnxQdq().emit(gm, scheme("iao_w8a8"), target("onnxruntime")).data
