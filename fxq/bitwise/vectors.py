"""LLVM's vectors for numba: operations on addresses and numbers of int64 that later files make from it, and which instructions they become.

One source serves every instruction set: LLVM chooses the instructions (``vpopcntq``, ``vpternlogq``, ``vpshufb``, ``cnt``, ...) for the processor
that numba compiles for; only the sizes of the vectors depend on it. Imported only where numba is.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils as untyped_cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

cgutils: Any = untyped_cgutils  # numba has types for a part of itself only
I1, I8, I16, I32, I64, F32, F64 = ir.IntType(1), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.DoubleType()
ROUNDER = 1.5 * 2**23
"""Added and taken away, it rounds a float32 below 2**22 to even."""

PROBE = """define void @probe(<8 x i64>* %a) {
  %x = load <8 x i64>, <8 x i64>* %a
  %y = call <8 x i64> @llvm.ctpop.v8i64(<8 x i64> %x)
  store <8 x i64> %y, <8 x i64>* %a
  ret void
}
declare <8 x i64> @llvm.ctpop.v8i64(<8 x i64>)
"""


def probe(triple: str, cpu: str, features: str) -> tuple[str, int]:
    """The instructions that LLVM takes for a population count on a processor, and how many 64-bit lanes its vectors have."""
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features)
    text = machine.emit_assembly(llvm.parse_assembly(PROBE.replace("* %a) {", '* %a) "prefer-vector-width"="512" "min-legal-vector-width"="512" {')))
    if "zmm" in text:
        return ("AVX-512 VPOPCNTDQ" if "vpopcnt" in text else "AVX-512"), 8
    if "ymm" in text:
        return ("AVX-512 VPOPCNTDQ" if "vpopcnt" in text else "AVX2" if re.search(r"vpshufb\s+%ymm", text) else "generic"), 4
    return ("NEON" if re.search(r"\bcnt\s+[vz]", text) else "generic"), 2


PATH, LANES = probe(*cpu_target.target_context.codegen().magic_tuple())


def operation(arity: int, result: Any = types.void) -> Callable[[Callable[..., Any]], Any]:
    """Make a numba intrinsic of ``arity`` int64 operands from ``body(builder, *operands)``."""

    def wrap(body: Callable[..., Any]) -> Any:
        def codegen(context: Any, b: Any, signature: Any, args: Any) -> Any:
            for wide in ('"prefer-vector-width"="512"', '"min-legal-vector-width"="512"'):  # some processors are tuned for 256 bits
                set.add(b.function.attributes, wide)
            value = body(b, *args)
            return context.get_dummy_value() if result is types.void else value

        def typed(context: Any, *operands: Any) -> Any:
            return result(*[types.int64] * arity), codegen

        names = ["context", *(f"operand{i}" for i in range(arity))]
        typed.__signature__ = Signature([Parameter(n, Parameter.POSITIONAL_OR_KEYWORD) for n in names])  # type: ignore[attr-defined]
        return intrinsic(typed)

    return wrap


def vec(element: Any, n: int) -> Any:
    return ir.VectorType(element, n)


def const(element: Any, n: int, value: Any) -> Any:
    return ir.Constant(vec(element, n), [value] * n)


def pointer(b: Any, address: Any, kind: Any) -> Any:
    return b.inttoptr(address, kind.as_pointer())


def load(b: Any, address: Any, kind: Any, align: int = 1) -> Any:
    return b.load(pointer(b, address, kind), align=align)


def store(b: Any, value: Any, address: Any, align: int = 1) -> None:
    b.store(value, pointer(b, address, value.type), align=align)


def splat(b: Any, x: Any, n: int) -> Any:
    v = b.insert_element(ir.Constant(vec(x.type, n), ir.Undefined), x, I32(0))
    return b.shuffle_vector(v, v, const(I32, n, 0))


def joined(b: Any, parts: list[Any], n: int) -> Any:
    """Vectors of ``n`` elements one behind the other; a power of two of them."""
    while len(parts) > 1:
        parts = [b.shuffle_vector(p, q, ir.Constant(vec(I32, 2 * n), list(range(2 * n)))) for p, q in zip(parts[::2], parts[1::2], strict=True)]
        n *= 2
    return parts[0]


def element(b: Any, address: Any, index: Any, size: int) -> Any:
    return b.add(address, b.mul(index, I64(size)))


def variable(b: Any, value: Any) -> Any:
    return cgutils.alloca_once_value(b, value)


@operation(2, types.int64)
def fetch_add(b: Any, address: Any, value: Any) -> Any:
    """Atomic sum: the old value of an int64."""
    return b.atomic_rmw("add", pointer(b, address, I64), value, "monotonic")


@operation(1, types.int64)
def load64(b: Any, address: Any) -> Any:
    """An int64."""
    return load(b, address, I64, 8)


@operation(1, types.int64)
def load32(b: Any, address: Any) -> Any:
    """An int32 as int64."""
    return b.sext(load(b, address, I32, 4), I64)


@operation(1, types.int64)
def load8(b: Any, address: Any) -> Any:
    """A uint8 as int64."""
    return b.zext(load(b, address, I8), I64)


@operation(2)
def store64(b: Any, address: Any, value: Any) -> None:
    """Write an int64."""
    store(b, value, address, 8)


@operation(2)
def store32(b: Any, address: Any, value: Any) -> None:
    """Write the low half of an int64."""
    store(b, b.trunc(value, I32), address, 4)


@operation(2)
def store8(b: Any, address: Any, value: Any) -> None:
    """Write the low byte of an int64."""
    store(b, b.trunc(value, I8), address)


@operation(1, types.int64)
def ctpop(b: Any, x: Any) -> Any:
    """Set bits."""
    return b.ctpop(x)


def _move(kind: Any) -> Any:
    @operation(2)
    def move(b: Any, to: Any, source: Any) -> None:
        """One number to another place."""
        store(b, load(b, source, kind), to)

    return move


move8, move16, move32 = _move(I8), _move(I16), _move(I32)


@operation(3)
def copy(b: Any, to: Any, source: Any, size: Any) -> None:
    """memcpy."""
    cgutils.raw_memcpy(b, pointer(b, to, I8), pointer(b, source, I8), size, 1)


@operation(2)
def zero(b: Any, to: Any, size: Any) -> None:
    """memset with 0."""
    cgutils.memset(b, pointer(b, to, I8), size, 0)


def rounded(b: Any, real: Any, least: Any, most: Any, n: int) -> Any:
    """float32 values (least and most: vectors) clipped and rounded to even, int32."""
    real = b.select(b.fcmp_ordered(">", real, least), real, least)
    real = b.select(b.fcmp_ordered("<", real, most), real, most)
    magic = const(F32, n, ROUNDER)
    return b.fptosi(b.fsub(b.fadd(real, magic), magic), vec(I32, n))
