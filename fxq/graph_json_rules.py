"""What the graph of a file may name, and how large it may be: the allow-list behind :mod:`fxq.graph_json`.

torch.fx writes the names of nodes, placeholders, keyword arguments and modules into the Python source of ``forward`` and runs it, so a file's names are
checked here before they reach torch: plain names only, known classes only, functions that compute on tensors only. Nothing that opens files, loads code,
compiles, takes a function, writes into a tensor that is handed in (``out=``), or reaches the storage of a tensor is on the list. What the allowed
functions allocate is decided when the model is called, never when it is read.
"""

from __future__ import annotations

import importlib
import keyword
import operator
import re
import types
import typing
import unicodedata
from collections.abc import Callable, Hashable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from fxq.errors import ArtifactError

CLASSES = {
    "fxq.modules": ("Add", "Sub", "Mul", "Div", "MatMul", "Cat", "Reshape", "Expand", "Permute", "Slice", "IndexSelect", "Split", "Pad", "Resize",
                    "Mean", "Sum", "GlobalAvgPool", "Clamp", "Unary", "Power", "FakeQuantize", "Quantized"),
    "fxq.convolutions": ("PaddedConv1d", "PaddedConv2d", "PaddedConv3d", "ChannelAffine1d", "ChannelAffine2d", "ChannelAffine3d", "BoxMean"),
    "fxq.shared": ("SharedConv1d", "SharedConv2d", "SharedConv3d", "SharedConvTranspose1d", "SharedConvTranspose2d", "SharedConvTranspose3d", "SharedLinear",
                   "SharedPaddedConv1d", "SharedPaddedConv2d", "SharedPaddedConv3d"),
    "fxq.observers": ("Observer", "MovingAverage"),
    "fxq.trackers": ("MeanMagnitude", "Tracker", "LearnedStep", "Clip", "Sign", "Ternary", "TrackedFakeQuantize"),
    "fxq.estimators": ("SignEstimator", "TernaryEstimator", "DoReFaEstimator", "StepEstimator", "RangeEstimator"),
    "fxq.training": ("TrainedLayer", "FloatLayer", "FloatNorm"),
    "fxq.training_lowbit": ("EstimatedLayer",),
    "fxq.training_shared": ("SharedLayer",),
}  # fmt: skip
"""Classes of fxq that a file may hold."""

OPERATORS = ("getitem", "add", "sub", "mul", "truediv", "floordiv", "neg", "pow", "matmul", "mod", "and_", "or_", "eq", "ne", "lt", "le", "gt", "ge", "invert")
"""Functions of Python's ``operator``."""

FUNCTIONS = frozenset(
    """
    abs absolute acos acosh adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool1d_with_indices
    adaptive_max_pool2d adaptive_max_pool2d_with_indices adaptive_max_pool3d adaptive_max_pool3d_with_indices add addbmm addcdiv addcmul addmm addmv addr
    adjoint affine_grid affine_grid_generator airy_ai alias_copy all allclose alpha_dropout amax amin aminmax angle any arccos arccosh arcsin arcsinh arctan
    arctan2 arctanh argmax argmin argsort argwhere as_strided as_strided_copy as_strided_scatter asin asinh atan atan2 atanh atleast_1d atleast_2d
    atleast_3d avg_pool1d avg_pool2d avg_pool3d baddbmm batch_norm bernoulli bessel_j0 bessel_j1 bessel_y0 bessel_y1 bfloat16 bilinear binary_cross_entropy
    binary_cross_entropy_with_logits bincount binomial bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor block_diag bmm
    bool broadcast_tensors broadcast_to bucketize byte cartesian_prod cat cdist cdouble ceil celu cfloat chain_matmul chalf channel_shuffle char
    chebyshev_polynomial_t chebyshev_polynomial_u chebyshev_polynomial_v chebyshev_polynomial_w cholesky cholesky_ex cholesky_inverse cholesky_solve chunk
    clamp clamp_max clamp_min clip clone column_stack combinations complex concat concatenate cond conj conj_physical constant_pad_nd contiguous conv1d
    conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d conv_transpose3d convolution copy_ copysign corrcoef cos cosh cosine_embedding_loss
    cosine_similarity count_nonzero cov cpu cross cross_entropy cummax cummin cumprod cumsum cumulative_trapezoid deg2rad dequantize det detach detach_copy
    diag diag_embed diagflat diagonal diagonal_copy diagonal_scatter diff digamma dim dim_order dist div divide dot double dropout dropout1d dropout2d
    dropout3d dsplit dstack eig eigh eigvals eigvalsh einsum elu embedding embedding_bag empty_like entr eq equal erf erfc erfcx erfinv exp exp2 expand
    expand_as expand_copy expit expm1 fake_quantize_per_channel_affine fake_quantize_per_tensor_affine feature_alpha_dropout feature_dropout fft fft2 fftn
    fftshift fill_ fill_diagonal_ fix flatten flip fliplr flipud float float_power floor floor_divide fmax fmin fmod fold frac fractional_max_pool2d
    fractional_max_pool2d_with_indices fractional_max_pool3d fractional_max_pool3d_with_indices frexp frobenius_norm full_like gammainc gammaincc gammaln
    gather gaussian_nll_loss gcd ge gelu geqrf ger glu gradient greater greater_equal grid_sample grid_sampler grid_sampler_2d grid_sampler_3d group_norm gt
    gumbel_softmax half hardshrink hardtanh heaviside hermite_polynomial_h hermite_polynomial_he hfft hfft2 hfftn hinge_embedding_loss histc histogram
    histogramdd householder_product hsplit hstack huber_loss hypot i0 i0e i1 i1e ifft ifft2 ifftn ifftshift igamma igammac ihfft ihfft2 ihfftn imag index
    index_add index_copy index_fill index_put index_reduce index_select inner instance_norm int interpolate inv inv_ex inverse irfft irfft2 irfftn
    is_complex is_conj is_contiguous is_floating_point is_neg is_nonzero is_same_size is_signed isclose isfinite isin isinf isnan isneginf isposinf isreal
    istft item kl_div kron kthvalue l1_loss laguerre_polynomial_l layer_norm lcm ldexp ldl_factor ldl_factor_ex ldl_solve le leaky_relu
    legendre_polynomial_p lerp less less_equal lgamma linear local_response_norm log log10 log1p log2 log_ndtr log_softmax logaddexp logaddexp2 logcumsumexp
    logdet logical_and logical_not logical_or logical_xor logit logsigmoid logsumexp long lp_pool1d lp_pool2d lp_pool3d lstsq lt lu lu_factor lu_factor_ex
    lu_solve lu_unpack margin_ranking_loss masked_fill masked_scatter masked_select matmul matrix_exp matrix_norm matrix_power matrix_rank matrix_sqrth max
    max_pool1d max_pool1d_with_indices max_pool2d max_pool2d_with_indices max_pool3d max_pool3d_with_indices max_unpool1d max_unpool2d max_unpool3d maximum
    mean median meshgrid min minimum mish mm mode modified_bessel_i0 modified_bessel_i1 modified_bessel_k0 modified_bessel_k1 moveaxis movedim mse_loss
    msort mul multi_dot multi_head_attention_forward multi_margin_loss multigammaln multilabel_margin_loss multilabel_soft_margin_loss multinomial multiply
    mv mvlgamma nan_to_num nanmean nanmedian nanquantile nansum narrow narrow_copy native_batch_norm native_channel_shuffle native_dropout native_group_norm
    native_layer_norm native_norm ndimension ndtr ndtri ne neg negative nelement nextafter nll_loss nonzero nonzero_static norm norm_except_dim normalize
    not_equal nuclear_norm numel one_hot ones_like orgqr ormqr outer pad pairwise_distance pdist permute permute_copy pinv pinverse pixel_shuffle
    pixel_unshuffle poisson poisson_nll_loss polar polygamma positive pow prelu prod psi qr quantile quantize_per_channel quantize_per_tensor
    quantize_per_tensor_dynamic rad2deg ravel real reciprocal relu relu6 remainder renorm repeat repeat_interleave reshape reshape_as resolve_conj
    resolve_neg rfft rfft2 rfftn rms_norm roll rot90 round row_stack rrelu rsqrt rsub scaled_dot_product_attention scaled_modified_bessel_k0
    scaled_modified_bessel_k1 scatter scatter_add scatter_reduce searchsorted select select_copy select_scatter selu sgn shifted_chebyshev_polynomial_t
    shifted_chebyshev_polynomial_u shifted_chebyshev_polynomial_v shifted_chebyshev_polynomial_w short sigmoid sign signbit silu sin sinc sinh size
    slice_copy slice_inverse slice_scatter slogdet smooth_l1_loss soft_margin_loss softmax softmin softplus softshrink softsign solve solve_ex
    solve_triangular sort spherical_bessel_j0 split split_copy split_with_sizes split_with_sizes_copy sqrt square squeeze squeeze_copy stack std std_mean
    stft sub subtract sum sum_to_size svd svdvals swapaxes swapdims sym_float sym_ite sym_max sym_min sym_not sym_sqrt sym_sum t t_copy take take_along_dim
    tan tanh tanhshrink tensor_split tensordot tensorinv tensorsolve threshold tile to to_dense tolist topk trace transpose transpose_copy trapezoid trapz
    triangular_solve tril triplet_margin_loss triplet_margin_with_distance_loss triu true_divide trunc type type_as unbind unbind_copy unflatten unfold
    unfold_copy unique unique_consecutive unravel_index unsafe_chunk unsafe_split unsafe_split_with_sizes unsqueeze unsqueeze_copy vander var var_mean vdot
    vecdot vector_norm view view_as view_as_complex view_as_complex_copy view_as_real view_as_real_copy view_copy vsplit vstack where xlog1py xlogy zero_
    zeros_like zeta
    """.split()
)
"""Functions of torch, methods of tensors and ``aten`` operators, by the last part of their name; their in-place forms (``add_``) as well."""

ATEN = frozenset(
    """
    alias arange col2im copy eye fft_fft fft_fft2 fft_fftn fft_fftshift fft_hfft fft_ifft fft_ifft2 fft_ifftn fft_ifftshift fft_ihfft fft_irfft fft_irfft2
    fft_irfftn fft_rfft fft_rfft2 fft_rfftn fill full hardsigmoid hardswish im2col lift lift_fresh lift_fresh_copy linalg_cholesky linalg_cross linalg_det
    linalg_diagonal linalg_eigh linalg_inv linalg_inv_ex linalg_matmul linalg_matrix_exp linalg_matrix_norm linalg_matrix_power linalg_multi_dot linalg_norm
    linalg_pinv linalg_qr linalg_solve linalg_svd linalg_vecdot linalg_vector_norm linspace log_sigmoid log_sigmoid_forward mH mT new_full new_ones
    new_zeros numpy_T ones rand rand_like randn randn_like reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
    replication_pad3d scalar_tensor slice special_airy_ai special_digamma special_entr special_erf special_erfc special_erfcx special_erfinv special_exp2
    special_expit special_expm1 special_gammaln special_i0 special_i0e special_i1 special_i1e special_log1p special_log_ndtr special_log_softmax
    special_logit special_logsumexp special_ndtr special_ndtri special_psi special_round special_sinc special_softmax special_xlog1py special_xlogy
    special_zeta sym_numel sym_size tril_indices triu_indices upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d
    upsample_nearest3d upsample_trilinear3d zeros _adaptive_avg_pool2d _adaptive_avg_pool3d _log_softmax _native_batch_norm_legit
    _native_batch_norm_legit_no_training _prelu_kernel _scaled_dot_product_flash_attention_for_cpu _softmax _to_copy _unsafe_view _upsample_bicubic2d_aa
    _upsample_bilinear2d_aa _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d _weight_norm_interface
    """.split()
)
"""Further operators that only ``torch.ops.aten`` has."""

META: dict[str, tuple[type, ...]] = {
    "shape": (int,), "dynamic": (bool,), "dtype": (torch.dtype,), "grid": (str,), "integer": (bool,), "float_why": (str,), "reads_codes": (str,),
    "narrow": (str,), "int8_layer": (bool,), "left": (str,),
}  # fmt: skip
"""What is kept of a node's meta, and of what it is made."""

INNER = frozenset(vars(nn.Module()))
"""Attributes that every module has."""

LEVELS, MODULE_LEVELS = 128, 40
"""Bounds on the nesting of a graph's JSON and of its modules."""
TEXT, WHOLE = 1 << 16, 1 << 63
"""Bounds on the length of a text, in characters, and on the size of a whole number."""
NODES, PATHS = 100_000, 100_000
"""Bounds on the number of nodes, and of paths to modules (a module that is used twice has two)."""

_OURS = "Take files from fxq.save and lower('archive') only"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,999}")
_PART = re.compile(r"[^\"'\\.\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]{1,1000}")
_USED = frozenset("self forward inf nan NoneType torch device fx_pytree pytree operator getattr slice complex Ellipsis True False None".split())
_SPACES = ("torch", "torch.Tensor", "torch.functional", "torch.nn.functional", "torch.special", "torch.linalg", "torch.fft")


def refuse(fact: str, where: str | None = None) -> ArtifactError:
    """The error for a file that asks for what no file may have."""
    return ArtifactError(fact, where=where, way_out=_OURS)


def check_size(data: Any) -> None:
    """Bounds on nesting, texts and numbers of a graph's JSON, without recursion.

    Raises:
        ArtifactError: for what lies beyond them, and for values that JSON does not have.
    """
    stack = [(data, 0)]
    while stack:
        v, level = stack.pop()
        if level > LEVELS:
            raise refuse(f"it is nested more than {LEVELS} levels deep")
        if type(v) is dict:
            for k in v:
                _check_text(k)
            stack += [(x, level + 1) for x in v.values()]
        elif type(v) is list:
            stack += [(x, level + 1) for x in v]
        elif type(v) is int:
            if not -WHOLE <= v < WHOLE:
                raise refuse("it holds a whole number of more than 64 bits")
        elif type(v) is str:
            _check_text(v)
        elif v is not None and type(v) not in (bool, float):
            raise refuse(f"it holds a {type(v).__name__}")


def _check_text(text: Any) -> None:
    if type(text) is not str:
        raise refuse(f"it has the key {text!r}")
    if len(text) > TEXT:
        raise refuse(f"it holds a text of {len(text)} characters; {TEXT} are allowed")


def check_part(name: Any, where: str, owner: type[nn.Module] = nn.Module) -> None:
    """A name in the path of a module, parameter or buffer: nothing that could end a quoted text, and no attribute of its owner's class.

    Args:
        name: one part of a path, without dots. owner: class of the module that has it.
    """
    if not isinstance(name, str) or not _PART.fullmatch(name) or name.startswith("__") or unicodedata.normalize("NFKC", name) != name:
        raise refuse(f"{_short(name)} is no name of a module or tensor", where)
    if hasattr(owner, name):
        raise refuse(f"it sets the attribute {name!r}, which {owner.__name__} has already", where)


def check_attribute(cls: type[nn.Module], name: Any, taken: Any, where: str) -> None:
    """A plain attribute: a name that hides no method, property, parameter, buffer or child of the module."""
    mine = getattr(cls, name, None) if isinstance(name, str) else None
    plain = isinstance(name, str) and name.isidentifier() and not name.startswith("__") and unicodedata.normalize("NFKC", name) == name
    if not plain or name in INNER or hasattr(nn.Module, name) or callable(mine) or hasattr(mine, "__get__") or name in taken:
        raise refuse(f"it sets the attribute {_short(name)}", where)


def check_node(op: Any, target: Any, args: Any, kwargs: Any, name: Any) -> None:
    """Names that torch writes into the source of ``forward``.

    Args:
        target: as the file has it, a text. args: a tuple. kwargs: keyword arguments by name.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name) or keyword.iskeyword(name) or name in _USED:
        raise refuse(f"a node is called {_short(name)}, which is no name")
    if not isinstance(target, str) or not isinstance(args, tuple) or not isinstance(kwargs, Mapping):
        raise refuse("its target is no text, or its arguments are no tuple and no names", name)
    good = True
    if op == "placeholder":
        bare = target.removeprefix("*").removeprefix("*")
        good = bool(_NAME.fullmatch(bare)) and not keyword.iskeyword(bare) and bare not in _USED
    elif op in ("call_module", "get_attr"):
        good = all(_PART.fullmatch(p) and not keyword.iskeyword(p) and not p.startswith("__") for p in target.split("."))
    elif op == "output":
        good = target == "output"
    elif op not in ("call_function", "call_method"):
        raise refuse(f"it does {_short(op)}, which no node does", name)
    if not good:
        raise refuse(f"its target {_short(target)} is no name", name)
    for k in kwargs:
        if not _NAME.fullmatch(k) or keyword.iskeyword(k) or k in ("self", "out"):
            raise refuse(f"it has the argument {_short(k)}, which no file may hold", name)


def check_meta(key: str, value: Any, where: str) -> Any:
    """``value`` of a node's meta, when it is made of what belongs there."""
    stack = [value]
    while stack:
        v = stack.pop()
        if isinstance(v, (list, tuple)):
            stack += v
        elif v is not None and type(v) not in META[key]:
            raise refuse(f"its {key} holds a {type(v).__name__}", where)
    return value


def _short(v: Any) -> str:
    text = ascii(v)
    return text if len(text) <= 60 else text[:57] + "..."


@lru_cache
def _constants() -> dict[tuple[str, type], Any]:
    kinds = (torch.dtype, torch.memory_format)
    return {(str(v).removeprefix("torch."), type(v)): v for v in vars(torch).values() if isinstance(v, kinds)}


def constant(name: Any, kind: type) -> Any:
    """A dtype or memory format of torch by its name."""
    found = _constants().get((name, kind)) if isinstance(name, str) else None
    if found is None:
        raise refuse(f"{_short(name)} is no {kind.__name__}")
    return found


def class_named(name: Any) -> type[nn.Module] | None:
    """A class of torch.nn or of :data:`CLASSES` by its full name, or ``None``."""
    module, _, cls = str(name).rpartition(".")
    if module in CLASSES and cls in CLASSES[module]:
        found: Any = getattr(importlib.import_module(module), cls)
        return found  # type: ignore[no-any-return]
    if module.startswith("torch.nn.modules.") and not cls.startswith("Lazy"):
        found = getattr(nn, cls, None)
        known = isinstance(found, type) and issubclass(found, nn.Module) and f"{found.__module__}.{found.__qualname__}" == name
        return found if known else None
    return None


@lru_cache
def _hints(cls: Any) -> dict[str, Any]:
    return {k: v for k, v in typing.get_type_hints(cls).items() if not hasattr(nn.Module, k)}


def check_type(cls: Any, name: str, value: Any, where: str) -> None:
    """An attribute that its class annotates has the type that it says."""
    hint = _hints(cls).get(name)
    if hint is not None and not _fits(value, hint):
        raise refuse(f"its attribute {name!r} is a {type(value).__name__}", where)


@lru_cache
def _data_hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def fitting(cls: Any, fields: dict[str, Any]) -> Any:
    """An object of a data class, from fields of the types that it says."""
    hints = _data_hints(cls)
    for name, value in fields.items():
        if name not in hints or not _fits(value, hints[name]):
            raise refuse(f"its {_short(name)} is a {type(value).__name__}", cls.__name__)
    return cls(**fields)


def _fits(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, h) for h in args)
    if origin is typing.Literal:
        return value in args
    if origin is tuple and args and args[-1] is not Ellipsis:
        return isinstance(value, (tuple, list)) and len(value) == len(args) and all(map(_fits, value, args))
    if origin in (tuple, list):
        return isinstance(value, (tuple, list)) and all(_fits(v, args[0]) for v in value if args)
    if origin is Mapping:
        return isinstance(value, dict) and all(_fits(k, args[0]) and _fits(v, args[1]) for k, v in value.items())
    if hint in (None, type(None)):
        return value is None
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is bool:
        return isinstance(value, int)
    return not isinstance(hint, type) or isinstance(value, hint) or origin is not None


def function_name(fn: Any, where: str) -> str:
    """The name under which a file holds a function.

    Raises:
        ArtifactError: when no file may hold it.
    """
    if isinstance(fn, torch._ops.OpOverload):
        name: str | None = f"torch.ops.{fn}"
    else:
        own = str(getattr(fn, "__name__", ""))
        if own in OPERATORS and getattr(operator, own) is fn:
            return f"operator.{own}"
        name = torch.overrides.resolve_name(fn)
    if name is None or _function(name) is not fn:
        fact = f"the function {getattr(fn, '__name__', fn)!r} is no tensor function of torch"
        raise ArtifactError(fact, where=where, way_out="Write it with torch's functions")
    return name


def function_named(name: Any) -> Callable[..., Any]:
    """A function that a file may name.

    Raises:
        ArtifactError: for any other.
    """
    found = _function(name) if isinstance(name, str) else None
    if found is None:
        raise refuse(f"it names the function {_short(name)}, which no file may hold")
    return found  # type: ignore[no-any-return]


def _allowed(name: str) -> bool:
    return name in FUNCTIONS or (name.endswith("_") and name[:-1] in FUNCTIONS and name != "as_strided_")


def _function(name: str) -> Any:
    space, _, last = name.rpartition(".")
    if space == "operator":
        return getattr(operator, last) if last in OPERATORS else None
    if space.startswith("torch.ops.aten."):
        op = space.removeprefix("torch.ops.aten.")
        packet = getattr(torch.ops.aten, op, None) if _allowed(op) or op in ATEN else None
        found: Any = getattr(packet, last) if packet is not None and last in packet.overloads() else None
        return None if found is None or any(a.is_out for a in found._schema.arguments) else found
    if space not in _SPACES or not _allowed(last):
        return None
    found = torch
    for part in name.split(".")[1:]:
        found = getattr(found, part, None)
    return found if isinstance(found, Hashable) and found in torch.overrides.get_testing_overrides() else None


def check_method(name: Any) -> None:
    """A method of tensors that a file may name.

    Raises:
        ArtifactError: for any other.
    """
    if not isinstance(name, str) or not _allowed(name) or getattr(Tensor, name, None) not in torch.overrides.get_testing_overrides():
        raise refuse(f"it names the method {_short(name)}, which is none that computes on a tensor")


def check_target(root: nn.Module, op: str, target: str) -> None:
    """Nodes run registered modules and read registered tensors, nothing else that an attribute leads to."""
    *path, last = target.split(".")
    module: Any = root
    for part in path:
        module = module._modules.get(part) if module is not None else None
    tables = () if module is None else (module._modules,) if op == "call_module" else (module._parameters, module._buffers)
    if all(t.get(last) is None for t in tables):
        raise refuse(f"its graph is damaged: there is no {_short(target)}")
