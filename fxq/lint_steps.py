"""What ONNX Runtime's optimizer does to Q/DQ nodes around the fusion into integer kernels, step by step.

Source: behaviour of onnxruntime 1.31 (``core/optimizer/qdq_transformer``), found by experiment. Each step takes a :class:`~fxq.lint_graph.Net` and says
whether it changed it.
"""

from __future__ import annotations

import onnx

from fxq.lint_clips import CODES, zero_point
from fxq.lint_graph import DQ, FLOATS, Net, Op, Q, has

S8_TO_U8 = -CODES[onnx.TensorProto.INT8].qmin
MOVES: dict[str, tuple[int, ...]] = {  # a Q or DQ moves through these, in the versions that the runtime knows
    "MaxPool": (12, 22),
    "Reshape": (5, 13, 14, 19, 21, 23),
    "Transpose": (1, 13, 21, 23),
    "Squeeze": (1, 11, 13, 21, 23),
    "Unsqueeze": (1, 11, 13, 21, 23),
    "Slice": (1, 10, 11, 13),
}


def scalar_grid(net: Net, op: Op) -> bool:
    """Scale and zero point (if any) are constant scalars."""
    return net.scalar(op.inputs[1]) is not None and zero_point(net, op) is not None


def same_grid(net: Net, a: Op, b: Op) -> bool:
    """Both have explicit constant scalar scale and zero point, and they are equal."""
    if not (has(a, 2) and has(b, 2) and scalar_grid(net, a) and scalar_grid(net, b)) or net.codes(a) != net.codes(b):
        return False
    return net.scalar(a.inputs[1]) == net.scalar(b.inputs[1]) and zero_point(net, a) == zero_point(net, b)


def fold_constants(net: Net) -> bool:
    """Nodes that read only constants become constants; dequantization stays, since fusion needs it."""
    changed = False
    for op in net:
        given = [name for name in op.inputs if name]
        if op.is_dq or net.is_output(op) or not given or not all(name in net.const_names for name in given):
            continue
        if op.op.startswith("Random"):
            continue
        net.const_names.update(op.outputs)
        net.remove(op)
        changed = True
    return changed


def drop_identities(net: Net) -> bool:
    """Identity, and Dropout of an inference graph, go away."""
    changed = False
    for op in net:
        if op.op in ("Identity", "Dropout") and not net.is_output(op):
            if op.op == "Dropout" and len(op.outputs) > 1 and net.readers(op.outputs[1]):
                continue
            source = op.inputs[0]
            net.remove(op)
            for user, slot in list(net.readers(op.outputs[0])):
                net.rewire(user, slot, source)
            changed = True
    return changed


def merge_twins(net: Net) -> bool:
    """Nodes of the same kind with equal inputs become one; DQs do not, each reader keeps its own."""
    seen: dict[object, Op] = {}
    changed = False
    for op in net:
        attrs = tuple(sorted((k, str(v)) for k, v in op.attrs.items()))
        twin = seen.setdefault((op.op, op.domain, attrs, len(op.outputs), tuple(net.key(i) for i in op.inputs)), op)
        if twin is op or net.is_output(op) or op.op.startswith("Random") or op.is_dq:
            continue
        net.remove(op)
        twin.origins += op.origins
        for old, new in zip(op.outputs, twin.outputs, strict=True):
            for user, slot in list(net.readers(old)):
                net.rewire(user, slot, new)
        changed = True
    return changed


def drop_double_pairs(net: Net) -> bool:
    """Q-DQ-Q-DQ in a row becomes one pair."""
    changed = False
    for dq in net:
        first = net.maker.get(dq.inputs[0]) if dq.is_dq else None
        second = net.only_reader(dq) if first is not None and first.is_q else None
        last = net.only_reader(second) if second is not None and second.is_q else None
        if first is None or second is None or last is None or not last.is_dq or net.only_reader(first) is not dq:
            continue
        if net.types.get(first.inputs[1]) != onnx.TensorProto.FLOAT:
            continue
        if same_grid(net, first, dq) and same_grid(net, second, last) and net.codes(first) == net.codes(second):
            net.remove(dq)
            net.remove(second)
            net.rewire(last, 0, first.outputs[0])
            narrow = min((first, second), key=lambda q: net.scalar(q.inputs[1]) or 0.0)
            for op in (first, last):
                net.rewire(op, 1, narrow.inputs[1])
                net.rewire(op, 2, narrow.inputs[2])
            changed = True
    return changed


def matmul_add(net: Net) -> bool:
    """MatMul and Add of a vector become Gemm (with Reshapes around it when the input has not two dimensions)."""
    changed = False
    for op in net:
        add = net.only_reader(op) if op.op == "MatMul" else None
        if add is None or add.op != "Add":
            continue
        bias = add.inputs[1 - add.inputs.index(op.outputs[0])]
        a, b, c = (net.shapes.get(name) for name in (op.inputs[0], op.inputs[1], bias))
        if a is None or b is None or c is None or len(b) != 2 or net.types.get(op.inputs[0]) not in FLOATS:
            continue
        flat = len(a) == 2
        if (not flat and None in (*a, *b)) or not (c == (b[1],) or (flat and len(c) == 2 and (c == (1, b[1]) or (c[0] == a[0] and c[1] in (1, b[1]))))):
            continue
        _to_gemm(net, op, add, bias, flat)
        changed = True
    return changed


def _to_gemm(net: Net, op: Op, add: Op, bias: str, flat: bool) -> None:
    x, y = op.inputs[0], add.outputs[0]
    net.remove(op)
    net.remove(add)
    ready, gives = (x, y) if flat else (net.fresh(x), net.fresh(y))
    gemm = net.add(Op("Gemm", [ready, op.inputs[1], bias], [gives], {"beta": 1.0}, op.name, origins=[*op.origins, *add.origins]), add)
    if not flat:
        net.add(Op("Reshape", [x], [ready], since=14), gemm)
        net.add(Op("Reshape", [gives], [y], since=14), gemm, after=True)


def transpose_into_gemm(net: Net) -> bool:
    """Transpose of an input of Gemm becomes its transA or transB."""
    changed = False
    for op in net:
        if op.op != "Transpose" or tuple(op.attrs.get("perm", ())) not in ((), (1, 0)) or net.is_output(op) or not net.edges(op):
            continue
        if len(net.shapes.get(op.inputs[0], ())) == 2 and all(u.op == "Gemm" and slot < 2 for u, slot in net.edges(op)):
            net.remove(op)
            for user, slot in list(net.readers(op.outputs[0])):
                flag = ("transA", "transB")[slot]
                user.attrs[flag] = 1 - int(user.attrs.get(flag, 0))
                user.origins += op.origins
                net.rewire(user, slot, op.inputs[0])
            changed = True
    return changed


def transpose_weights(net: Net) -> bool:
    """Transpose of a dequantized constant is done on the constant."""
    changed = False
    for op in net:
        dq = net.maker.get(op.inputs[0]) if op.op == "Transpose" else None
        if dq is None or not dq.is_dq or dq.inputs[0] not in net.const_names or net.only_reader(dq) is not op or net.is_output(op):
            continue
        shape = net.shapes.get(dq.inputs[0], ())
        perm = list(op.attrs.get("perm", range(len(shape) - 1, -1, -1)))
        codes = net.fresh(dq.inputs[0])
        net.const_names.add(codes)
        net.shapes[codes] = tuple(shape[i] for i in perm)
        net.remove(op)
        net.rewire(dq, 0, codes)
        axis = int(dq.attrs.get("axis", 1))
        dq.attrs["axis"] = perm.index(axis + len(shape) if axis < 0 else axis) if len(shape) else axis
        net.set_outputs(dq, list(op.outputs))
        dq.origins += op.origins
        changed = True
    return changed


def _insert_pair(net: Net, source: str, targets: list[tuple[Op, int]], like: Op) -> None:
    """Between tensor ``source`` and its readers ``targets`` a Q and one DQ per reader, on the grid of ``like``."""
    codes, grid, kind = net.fresh(source), like.inputs[1:], net.codes(like)
    net.types[codes] = kind
    first = targets[0][0]
    q = net.add(Op(Q, [source, *grid], [codes], {}, "", like.domain), first)
    for user, slot in targets:
        out = net.fresh(source)
        net.add(Op(DQ, [codes, *grid], [out], {}, "", like.domain), q, after=True)
        net.rewire(user, slot, out)


def _moves(op: Op) -> bool:
    return op.since in MOVES.get(op.op, ())


def propagate_forward(net: Net) -> bool:
    """A DQ in front of an operation that only moves values is repeated behind it."""
    changed = False
    for dq in net:
        mover = net.only_reader(dq) if dq.is_dq and scalar_grid(net, dq) and dq.inputs[0] not in net.const_names else None
        stack = [mover] if mover is not None and net.edges(dq)[0][1] == 0 else []
        while stack:
            mover = stack.pop()
            if mover is None or not _moves(mover):
                continue
            targets = list(net.readers(mover.outputs[0]))
            if any(u.is_q for u, _ in targets):
                continue
            if mover.outputs[0] in net.outputs:
                _pair_at_output(net, mover, dq)
                changed = True
            elif targets:
                _insert_pair(net, mover.outputs[0], targets, dq)
                changed = True
            stack += [u for u, s in targets if s == 0]
    return changed


def _pair_at_output(net: Net, mover: Op, like: Op) -> None:
    """The same for a mover whose value is a graph output; other readers get a DQ of their own."""
    out = mover.outputs[0]
    inner, codes = net.fresh(out), net.fresh(out)
    net.types[codes] = net.codes(like)
    net.set_outputs(mover, [inner])
    for user, slot in list(net.readers(out)):
        own = net.fresh(out)
        net.add(Op(DQ, [codes, *like.inputs[1:]], [own], {}, "", like.domain), user)
        net.rewire(user, slot, own)
    q = net.add(Op(Q, [inner, *like.inputs[1:]], [codes], {}, "", like.domain), mover, after=True)
    net.add(Op(DQ, [codes, *like.inputs[1:]], [out], {}, "", like.domain), q, after=True)


def propagate_backward(net: Net) -> bool:
    """A Q behind an operation that only moves values is repeated in front of it."""
    changed = False
    for q in net:
        if not q.is_q or not scalar_grid(net, q):
            continue
        mover = net.maker.get(q.inputs[0])
        while mover is not None and _moves(mover) and net.only_reader(mover) is not None:
            source = mover.inputs[0]
            maker = net.maker.get(source)
            if maker is None:
                if source not in net.const_names:
                    _insert_pair(net, source, [(mover, 0)], q)
                    changed = True
                break
            if source in net.outputs or len(net.readers(source)) != 1 or maker.is_dq:
                break
            _insert_pair(net, source, [(mover, 0)], q)
            changed = True
            mover = maker
    return changed


def _leads_to_q(net: Net, op: Op) -> bool:
    """One reader after the other, through Relu and Clip, up to a Q."""
    if len(op.outputs) != 1:
        return False
    readers = net.readers(op.outputs[0])
    while len(readers) == 1:
        reader = readers[0][0]
        if reader.is_q:
            return True
        if reader.op not in ("Relu", "Clip"):
            return False
        readers = net.readers(reader.outputs[0])
    return False


def quantize_constants(net: Net) -> bool:
    """Float weights and biases of quantized Conv, ConvTranspose and Gemm get integers."""
    changed = False
    for op in net:
        if op.op not in ("Conv", "ConvTranspose", "Gemm"):
            continue
        x, w = net.maker.get(op.inputs[0]), net.maker.get(op.inputs[1])
        if x is None or not x.is_dq or net.scalar(x.inputs[1]) is None or not _leads_to_q(net, op):
            continue
        weight = w is None or not w.is_dq
        bias = has(op, 2)
        if weight and (op.inputs[1] not in net.const_names or net.types.get(op.inputs[1]) != onnx.TensorProto.FLOAT):
            continue
        if bias and (op.inputs[2] not in net.const_names or len(net.shapes.get(op.inputs[2], ())) != 1):
            continue
        if not weight and (not bias or (w is not None and not _axis_fits(net, op, w))):
            continue
        for slot, kind in ((1, onnx.TensorProto.INT8), (2, onnx.TensorProto.INT32)):
            if (slot == 1 and weight) or (slot == 2 and bias):
                _dequantized_constant(net, op, slot, kind)
        changed = True
    return changed


def _dequantized_constant(net: Net, op: Op, slot: int, kind: int) -> None:
    codes, out = net.fresh(op.inputs[slot]), net.fresh(op.inputs[slot])
    scale, zero = net.fresh(codes), net.fresh(codes)
    net.const[scale] = onnx.helper.make_tensor(scale, onnx.TensorProto.FLOAT, [], [1.0])
    net.const[zero] = onnx.helper.make_tensor(zero, kind, [], [0])
    net.types.update({codes: kind, scale: onnx.TensorProto.FLOAT, zero: kind})
    net.const_names |= {codes, scale, zero}
    net.made_scales.add(scale)
    net.add(Op(DQ, [codes, scale, zero] if slot == 1 else [codes, scale], [out]), op)
    net.rewire(op, slot, out)


def _axis_fits(net: Net, op: Op, dq: Op) -> bool:
    shape = net.shapes.get(dq.inputs[1])
    if net.scalar(dq.inputs[1]) is not None:
        return True
    if shape is None or len(shape) != 1 or shape != net.shapes.get(op.inputs[2]) or dq.attrs.get("block_size"):
        return False
    axis = dq.attrs.get("axis", 1)
    axis += len(net.shapes.get(dq.inputs[0], ())) if axis < 0 else 0
    want = 1 if op.op == "Gemm" and not op.attrs.get("transB") else 0
    return bool(axis == want)


def one_reader_per_dq(net: Net) -> bool:
    """Every reader gets its own DQ."""
    changed = False
    for dq in net:
        if not dq.is_dq:
            continue
        edges = list(net.readers(dq.outputs[0]))
        for user, slot in edges if net.is_output(dq) else edges[1:]:
            out = net.fresh(dq.outputs[0])
            net.add(Op(DQ, list(dq.inputs), [out], dict(dq.attrs), dq.name, dq.domain, dq.since), dq, after=True)
            net.rewire(user, slot, out)
            changed = True
    return changed


def signed_to_unsigned(net: Net) -> bool:
    """Signed 8-bit codes that one DQ reads become unsigned."""
    for q in net:
        dq = net.only_reader(q) if q.is_q else None
        if dq is not None and dq.is_dq and net.codes(q) == onnx.TensorProto.INT8 and same_grid(net, q, dq):
            zero = zero_point(net, q)
            name = net.fresh(q.inputs[2])
            net.const[name] = onnx.helper.make_tensor(name, onnx.TensorProto.UINT8, [], [int(zero or 0) + S8_TO_U8])
            net.types[name] = net.types[q.outputs[0]] = onnx.TensorProto.UINT8
            net.rewire(q, 2, name)
            net.rewire(dq, 2, name)
            q.shifted = S8_TO_U8
    return False


def drop_dq_q(net: Net) -> bool:
    """DQ and Q on one grid cancel."""
    for dq in net:
        q = net.only_reader(dq) if dq.is_dq else None
        if q is None or not q.is_q or not same_grid(net, dq, q) or (net.is_output(q) and net.edges(q)):
            continue
        net.remove(dq)
        net.remove(q)
        for user, slot in list(net.readers(q.outputs[0])):
            net.rewire(user, slot, dq.inputs[0])
    return False


FIRST = (one_reader_per_dq, propagate_forward)
"""Once, in front of all else: readers get DQs of their own, and those pass what moves codes before equal DQs are merged again."""
BEFORE = (
    drop_identities, drop_double_pairs, merge_twins, fold_constants, transpose_into_gemm, transpose_weights, matmul_add,
    propagate_forward, propagate_backward, quantize_constants, one_reader_per_dq,
)  # fmt: skip
