"""Where low-bit nets run: no sign of a sum in float, no max pool on codes in a float convolution's layout."""

from collections import Counter

import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxq
from fxq.graph import kind
from fxq.lint import agrees, lint, optimize, runtime_report


class Net(nn.Module):
    """A stem with a pool, and two residual blocks whose sums only convolutions read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.down, self.c, self.fc = nn.Conv2d(16, 32, 1, 2), nn.Conv2d(16, 32, 3, 2, 1), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        x = self.b(self.a(x)) + x
        x = self.c(x) + self.down(x)
        return self.fc(x.mean((2, 3)))


def compiled(scheme: str, **options: object) -> fxq.CompiledModel:
    torch.manual_seed(0)
    return fxq.compile(Net().eval(), scheme, calibration=torch.randn(4, 3, 16, 16), **options)  # type: ignore[arg-type]


def test_signs_of_sums_are_taken_on_codes() -> None:
    m = compiled("xnor_w1a1")
    data = m.lower().data
    report = lint(data)
    floats = Counter(o.op for o in report.ops if o.runs == "float")
    assert floats == {"Conv": 1, "Relu": 1, "MaxPool": 2, "LeakyRelu": 1, "GreaterOrEqual": 1, "Where": 1, "Gemm": 1}
    ops = Counter(n.op_type for n in optimize(onnx.load_from_string(data)).graph.node)
    assert ops["QLinearConv"] == 4 and ops["QLinearAdd"] == 3 and ops["Add"] == 0  # the third gives the sign of the first sum
    assert m.verify(data, torch.randn(2, 3, 16, 16)).ok and agrees(report, runtime_report(data)) == []


def test_a_pool_behind_a_float_layer_stays_float() -> None:
    """Also with skip=, where the runtime would move the QuantizeLinear in front of it."""
    for m in (compiled("dorefa_w4a4"), compiled("tbn_w1at"), compiled("iao_w8a8", skip=["stem"])):
        data = m.lower().data
        pools = [n for n in m.graph_module.graph.nodes if kind(m.graph_module, n) == "max_pool"]
        assert pools and not any(n.meta["integer"] for n in pools)
        made = {o: n for n in optimize(onnx.load_from_string(data)).graph.node for o in n.output}
        for n in made.values():
            if n.op_type == "MaxPool":
                assert made[n.input[0]].op_type not in ("QuantizeLinear", "Clip")
        assert {o.runs for o in lint(data).ops if o.op == "MaxPool"} == {"float"}
        assert [d for d in agrees(lint(data), runtime_report(data)) if "left: predicted" not in d] == []  # a float sum behind an integer layer turns the layout
        assert m.verify(data, torch.randn(2, 3, 16, 16)).ok


def test_a_pool_between_integer_layers_runs_on_codes() -> None:
    m = compiled("iao_w8a8")
    assert {o.runs for o in m.lint().ops if o.op == "MaxPool"} == {"int8"} and "LeakyRelu" not in {o.op for o in m.lint().ops}
