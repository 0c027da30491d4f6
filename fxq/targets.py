"""Targets: what a runtime executes in integers and where it wants its Q/DQ, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fxq.errors import SchemeError, TargetError, nearest
from fxq.schemes import Scheme
from fxq.spec import QuantSpec


@dataclass(frozen=True)
class OpRule:
    """How a runtime executes one kind of node in integers.

    Attributes:
        output: ``must`` (needs a grid on its output), ``may`` (can give float) or ``same`` (moves codes: the output
            has the input's grid).
        always: execute in integers even if its inputs must be quantized for it (weighted layers), instead of only
            where its inputs are on grids anyway.
        shrinks: worth integers even when no integer consumer follows.
        clamps: a ReLU or clamp behind it vanishes into the output's grid.
        dims: ranks of the input that the runtime's kernel takes; empty for any.
    """

    output: str
    always: bool = False
    shrinks: bool = False
    clamps: bool = False
    dims: tuple[int, ...] = ()


@dataclass(frozen=True)
class Target:
    """A runtime, as data.

    Attributes:
        name: ``onnxruntime``, ``float``, ...
        summary: one line for ``--list targets``.
        ops: kind of node -> how it is executed in integers.
        activations: activation grids that the runtime executes in integers (text forms); others are refused.
        weights: weight grids, likewise.
        int32_bias: the bias is int32 with scale ``s_a * s_w``; otherwise it stays float.
        forms: integer-friendly rewrites that ``legalize`` applies, by name.
        share: kinds whose inputs and output take one grid.
        opset, ir_version: of the ONNX file.
        unsigned_codes: activations on signed grids are stored as unsigned codes (``s8`` as ``u8`` with the zero point 128: the same reals).
    """

    name: str
    summary: str
    ops: Mapping[str, OpRule] = field(default_factory=dict)
    activations: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    int32_bias: bool = True
    forms: tuple[str, ...] = ()
    share: tuple[str, ...] = ()
    opset: int = 21
    ir_version: int = 10
    unsigned_codes: bool = False

    def require(self, scheme: Scheme) -> None:
        """Refuse a scheme whose grids this runtime does not take.

        Raises:
            SchemeError: naming the grid and the schemes that fit.
        """
        for role, spec, legal in (("activation", scheme.activation, self.activations), ("weight", scheme.weight, self.weights)):
            if spec is not None and str(_plain(spec)) not in legal:
                raise SchemeError(
                    f"target {self.name!r} does not take {role} grids of {spec} (scheme {scheme.name!r})",
                    way_out="It takes " + ", ".join(legal),
                )


def _plain(spec: QuantSpec) -> QuantSpec:
    return spec.per_tensor()


_MOVER = OpRule("same")
_ORT_OPS: dict[str, OpRule] = {
    "conv": OpRule("must", always=True, clamps=True),
    "linear": OpRule("may", always=True, clamps=True),
    "add": OpRule("must", clamps=True),
    "mul": OpRule("must", clamps=True),
    "sigmoid": OpRule("must"),
    "hardsigmoid": OpRule("must"),
    "leaky_relu": OpRule("must"),
    "relu": OpRule("must"),
    "global_avg_pool": OpRule("must", shrinks=True, clamps=True),
    "max_pool": OpRule("same", shrinks=True),
    "cat": _MOVER, "reshape": _MOVER, "permute": _MOVER, "slice": _MOVER, "split": _MOVER, "getitem": _MOVER,
    "index_select": _MOVER, "pad": _MOVER, "resize": _MOVER,
}  # fmt: skip

_ORT = Target(
    "onnxruntime",
    "ONNX Runtime CPU: Q/DQ graphs that fuse into integer kernels",
    ops=_ORT_OPS,
    activations=("u8/pt", "s8/pt"),
    weights=("s8n/pt", "s8/pt", "s8a/pt", "s4n/pt", "s4/pt"),
    forms=("tidy", "constants", "batch-norm", "hardswish", "silu", "avg-pool", "merge-pad", "relu-first", "resize-point", "prelu", "shuffle"),
    share=("cat",),
    # Signed codes become unsigned inside the runtime, but only where one node reads them: the rest would stay float. And from opset 21 on it
    # refuses its own optimized graph where a signed QuantizeLinear was moved across a reshape or transpose (1.31).
    unsigned_codes=True,
)
_TABLE: dict[str, Target] = {_ORT.name: _ORT}


def register(target: Target) -> Target:
    """Make ``target`` known by its name."""
    if _TABLE.get(target.name, target) != target:
        raise TargetError(f"a target called {target.name!r} exists already", way_out="Choose another name")
    _TABLE[target.name] = target
    return target


def get(target: str | Target) -> Target:
    """Target by name.

    Raises:
        TargetError: for an unknown name; the nearest one is offered.
    """
    if isinstance(target, Target):
        return target
    if not isinstance(target, str):
        raise TargetError(f"a target is a name or a Target, not {target!r}", way_out=nearest("", _TABLE))
    if target not in _TABLE:
        raise TargetError(f"unknown target {target!r}", way_out=nearest(target, _TABLE))
    return _TABLE[target]


def names() -> list[str]:
    """Names of all registered targets."""
    return list(_TABLE)
