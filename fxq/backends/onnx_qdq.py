"""onnx-qdq: the converted graph as ONNX with Q/DQ pairs and integer weights, written directly (no exporter)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from onnx import TensorProto, helper
from torch.fx import GraphModule, Node

from fxq.backends.onnx_ops import EMITTERS, HARD_SIGMOID_WIDTH, Writer
from fxq.graph import attr, data_inputs, kind, module_of
from fxq.lowering import Artifact, Issue, Lowering
from fxq.modules import FakeQuantize
from fxq.schemes import Scheme
from fxq.spec import QParams
from fxq.targets import Target

TYPES = {torch.float32: TensorProto.FLOAT, torch.int64: TensorProto.INT64, torch.int32: TensorProto.INT32, torch.bool: TensorProto.BOOL}


class OnnxQdq(Lowering):
    """Writes opset and IR version of the target, a dynamic batch, and names that follow the module path."""

    name: ClassVar[str] = "onnx-qdq"

    def check(self, gm: GraphModule, scheme: Scheme, target: Target) -> list[Issue]:
        issues = []
        for node in gm.graph.nodes:
            k = kind(gm, node)
            if k in ("input", "output", "attr", "fake_quantize"):
                continue
            if k == "getitem" and kind(gm, data_inputs(node)[0]) == "split":
                continue
            if k not in EMITTERS:
                what = str(getattr(node.target, "__name__", node.target))
                issues.append(Issue(node.name, f"fxq cannot write {what} ({k}) to ONNX", "Replace the operation in the model"))
        if scheme.method == "dynamic":
            issues.append(Issue("scheme", f"{scheme.name} has no ONNX form yet", "Use weight_only_w8 or iao_w8a8"))
        return issues

    def emit(self, gm: GraphModule, scheme: Scheme, target: Target) -> Artifact:
        from fxq import __version__

        w = Writer(gm)
        inputs: list[Any] = []
        outputs: list[Any] = []
        for node in gm.graph.nodes:
            k = kind(gm, node)
            if k == "input":
                w.names[node] = str(node.target)
                inputs.append(_info(str(node.target), node))
            elif k == "attr":
                w.names[node] = w.const(str(node.target), attr(gm, node))
            elif k == "fake_quantize":
                w.names[node] = _round(w, gm, node)
            elif k == "getitem":
                w.names[node] = f"{w.name(data_inputs(node)[0])}/{node.args[1]}"
            elif k == "output":
                outputs = [_output(w, name, n) for name, n in _results(node.args[0])]
            else:
                w.names[node] = EMITTERS[k](w, node, module_of(gm, node))
        graph = helper.make_graph(w.nodes, type(gm).__name__, inputs, outputs, list(w.initializers.values()))
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", target.opset)], ir_version=target.ir_version, producer_name="fxq", producer_version=__version__
        )
        helper.set_model_props(model, {"fxq.scheme": scheme.name, "fxq.target": target.name, "fxq.version": __version__})
        data = model.SerializeToString()
        weights = sum(len(t.raw_data) for t in w.initializers.values())
        return Artifact(self.name, data, {"bytes": {"total": len(data), "weights": weights}})


def _round(w: Writer, gm: GraphModule, node: Node) -> str:
    module = module_of(gm, node)
    assert isinstance(module, FakeQuantize)
    path, qp, source = str(node.target), module.qparams, data_inputs(node)[0]
    s, z = w.grid(path, qp)
    store_s = s
    if kind(gm, source) == "hardsigmoid" and source.meta.get("integer"):
        wide = QParams(qp.spec, qp.scale * HARD_SIGMOID_WIDTH, qp.zero_point)
        store_s, _ = w.grid(f"{path}/wide", wide)
    w.op("QuantizeLinear", [w.name(source), store_s, z], path)
    return w.op("DequantizeLinear", [path, s, z], f"{path}/dq")


def _results(value: Any) -> list[tuple[str, Node]]:
    if isinstance(value, Node):
        return [("output", value)]
    if isinstance(value, dict):
        return [(str(k), n) for k, v in value.items() for _, n in _results(v)]
    found = [n for v in value for _, n in _results(v)]
    return [(f"output_{i}", n) for i, n in enumerate(found)]


def _info(name: str, node: Node) -> Any:
    sizes = ["batch" if d else s for s, d in zip(node.meta["shape"], node.meta["dynamic"], strict=True)]
    return helper.make_tensor_value_info(name, TYPES[node.meta["dtype"]], sizes)


def _output(w: Writer, name: str, node: Node) -> Any:
    """A graph output with its own name (the runtime removes the Identity)."""
    w.op("Identity", [w.name(node)], name)
    return _info(name, node)


