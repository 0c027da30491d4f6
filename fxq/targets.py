"""Targets: what a runtime executes in integers and where it wants its Q/DQ, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from fxq import schemes
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
        weights: weight grids of schemes with activation grids, likewise; ``weight_only``: of schemes without.
        dynamic: it takes ranges that are measured at run time.
        int32_bias: the bias is int32 with scale ``s_a * s_w``; otherwise it stays float.
        forms: integer-friendly rewrites that ``legalize`` applies, by name.
        share: kinds whose inputs and output take one grid.
        opset, ir_version: of the ONNX file.
        unsigned_codes: activations on signed grids are stored as unsigned codes (``s8`` as ``u8`` with the zero point 128: the same reals).
        int8: name of the scheme that ``scheme="int8"`` stands for: the int8 that this runtime runs best.
        placement: where Q/DQ stand: ``outputs`` (every value that an integer operation gives is rounded, and kernels fuse to integer
            ones) or ``inputs`` (what weighted layers read is rounded, what they give stays float and is fused with what follows).
        least_channels: weighted layers with fewer input or output channels stay float (the first layer of a net excepted).
        float_why: kind of node -> why this runtime executes it in float.
        channel_multiple: widths of layers that its kernels fill whole vectors with (:class:`fxq.pruning.Prune`).
        capability: compute capability of an NVIDIA GPU (``86`` for 8.6), or ``None``.
        like: name of the target that this one is by another name: what passes decide and what its files hold are the same. Empty for one of its own.
    """

    name: str
    summary: str
    ops: Mapping[str, OpRule] = field(default_factory=dict)
    activations: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    weight_only: tuple[str, ...] = ()
    dynamic: bool = False
    int32_bias: bool = True
    forms: tuple[str, ...] = ()
    share: tuple[str, ...] = ()
    opset: int = 21
    ir_version: int = 10
    unsigned_codes: bool = False
    int8: str = "iao_w8a8"
    placement: str = "outputs"
    least_channels: int = 0
    float_why: Mapping[str, str] = field(default_factory=dict)
    channel_multiple: int = 16
    capability: int | None = None
    like: str = ""

    @property
    def family(self) -> str:
        """Runtime that takes the graph: ``tensorrt`` for all its capabilities, which differ in nothing that passes decide."""
        return "tensorrt" if self.placement == "inputs" else self.like or self.name

    @property
    def lint_name(self) -> str:
        """Name of the rules that its files are linted with."""
        return self.like or self.name if self.placement == "outputs" else "tensorrt" if self.capability is None else f"sm{self.capability}"

    @property
    def fused(self) -> bool:
        """The Q/DQ nodes of its files fuse to integer kernels whose every bit is known here."""
        return self.placement == "outputs"

    def scheme(self, scheme: str | Scheme) -> Scheme:
        """The scheme of that name, ``int8`` being the one that this runtime runs best.

        Raises:
            SchemeError: for an unknown name, or grids that this runtime does not take.
        """
        if scheme == "int8" and not self.int8:
            raise SchemeError(f"target {self.name!r} runs no int8", way_out=self._way_out("activation", ()))
        found = schemes.get(self.int8 if scheme == "int8" else scheme)
        self.require(found)
        return found

    def require(self, scheme: Scheme) -> None:
        """Refuse a scheme whose grids this runtime does not take.

        Raises:
            SchemeError: naming the grid and the schemes that fit.
        """
        if scheme.method == "dynamic" and not self.dynamic:
            fact = f"target {self.name!r} takes no ranges measured at run time (scheme {scheme.name!r})"
            raise SchemeError(fact, way_out=self._way_out("activation", self.activations))
        weights = self.weight_only if scheme.method == "weight-only" else self.weights
        for role, spec, legal in (("activation", scheme.kept_activation, self.activations), ("weight", scheme.kept_weight, weights)):
            if spec is not None and str(_plain(spec)) not in legal:
                raise SchemeError(
                    f"target {self.name!r} does not take {role} grids of {spec} (scheme {scheme.name!r})", way_out=self._way_out(role, legal)
                )

    def _way_out(self, role: str, legal: tuple[str, ...]) -> str:
        if not legal:
            return f"It runs no quantized {role}s; choose a compute capability from 8.0 on, or scheme='float'"
        takes = "It takes " + ", ".join(legal)
        return f"Use scheme='int8', which is {self.int8!r} here. {takes}" if self.int8 else takes


def _plain(spec: QuantSpec) -> QuantSpec:
    """Per channel is as good as per tensor; blocks are not."""
    return spec if spec.block is not None else spec.per_tensor()


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

_ORT_WEIGHTS = ("s8n/pt", "s8/pt", "s8a/pt", "s4n/pt", "s4/pt")
_ORT = Target(
    "onnxruntime",
    "ONNX Runtime CPU: Q/DQ graphs that fuse into integer kernels",
    ops=_ORT_OPS,
    activations=("u8/pt", "s8/pt"),
    weights=_ORT_WEIGHTS,
    weight_only=(*_ORT_WEIGHTS, "s4/pb32x1", "s4/pb64x1", "s4/pb128x1"),
    dynamic=True,
    forms=("tidy", "constants", "batch-norm", "hardswish", "silu", "avg-pool", "merge-pad", "relu-first", "resize-point", "prelu", "shuffle"),
    share=("cat",),
    # Signed codes become unsigned inside the runtime, but only where one node reads them: the rest would stay float. And from opset 21 on it
    # refuses its own optimized graph where a signed QuantizeLinear was moved across a reshape or transpose (1.31).
    unsigned_codes=True,
)
_BITWISE = replace(_ORT, name="bitwise", summary="onnxruntime by another name: low-bit layers run on packed bits", like="onnxruntime")
INT8_FROM, FLOAT8_FROM = 80, 89
"""Compute capabilities from which TensorRT runs int8 layers in int8, and takes 8-bit floats."""
_POINTWISE = ("relu", "clamp", "leaky_relu", "sigmoid", "hardsigmoid", "hardswish", "silu", "gelu", "tanh", "add", "mul", "sub", "div")
_MOVES = ("max_pool", "reshape", "permute", "slice", "split", "getitem", "index_select", "pad", "resize", "pixel_shuffle")
_FUSED = "TensorRT computes it in float, fused into the kernel before it; a Q in between would keep them apart"
_TENSORRT = Target(
    "tensorrt",
    "TensorRT, any GPU from compute capability 8.0 on: symmetric int8 at the inputs of weighted layers",
    ops={"conv": OpRule("may", always=True), "linear": OpRule("may", always=True), "matmul": OpRule("may", always=True), "cat": _MOVER},
    activations=("s8/pt",),
    weights=("s8n/pt", "s8/pt"),
    weight_only=("s4/pb64x1", "s4/pb128x1"),
    int32_bias=False,
    forms=("tidy", "merge-pad", "unpack"),
    share=("cat",),
    opset=19,
    ir_version=9,
    int8="iao_w8a8_sym",
    placement="inputs",
    least_channels=16,
    channel_multiple=32,
    float_why={
        **dict.fromkeys(_POINTWISE, _FUSED),
        **dict.fromkeys(_MOVES, "it only moves values: TensorRT moves the Q behind it to its front"),
        "conv_transpose": "TensorRT runs transposed convolutions in float",
        "softmax": "softmax stays float: its sums need the range",
        "layer_norm": "layer norm stays float: its sums need the range",
    },
)


_PORTABLE = replace(_TENSORRT, name="portable", summary="tensorrt by another name: one engine for all capabilities from 8.0 on")


def _capability(version: int) -> Target:
    """The TensorRT target of one compute capability."""
    name = f"TensorRT for compute capability {version // 10}.{version % 10}"
    target = replace(_TENSORRT, name=f"sm{version}", summary=name, capability=version)
    if version >= FLOAT8_FROM:
        return replace(target, activations=(*target.activations, "f8/pt"), weights=(*target.weights, "f8/pt"))
    if version >= INT8_FROM:
        return target
    return replace(target, summary=f"{name}: float only (int8 layers build and run in float)", activations=(), weights=(), weight_only=(), int8="")


_TABLE: dict[str, Target] = {t.name: t for t in (_ORT, _BITWISE, _TENSORRT, _PORTABLE, *map(_capability, (75, 80, 86, 89, 120, 121)))}


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
