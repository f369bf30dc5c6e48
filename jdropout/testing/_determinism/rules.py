"""Rules that turn operations into findings.

Where they come from: XLA, "Determinism (GPU)", and `ScatterExpander`, which replaces what is free
on a GPU; the table in the documentation of `jax.random`; NVIDIA/nccl issue 1497 and Megatron-LM's
``--deterministic-mode`` for sums over GPUs.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdropout.testing._determinism.environment import Environment
from jdropout.testing._determinism.trace import Operation


class Complaint(NamedTuple):
    """What a finding says, without its places."""

    code: str
    between: tuple[str, ...]
    message: str


_CALLBACKS = {"pure_callback", "io_callback"}  # a debug_callback returns nothing
_OPAQUE = {"ffi_call", "triton_kernel_call", "tpu_custom_call", "mosaic_gpu_p", "custom_call"}
_PRODUCTS = {"dot_general", "ragged_dot", "ragged_dot_general", "conv_general_dilated"}
_OVER_DEVICES = {"psum", "psum2", "psum_invariant", "unreduced_psum", "reduce_scatter"}
_SUMS = {"reduce_sum", "reduce_prod", "reduce_window_sum", "reduce_window"}
_SUMS |= {"cumsum", "cumprod", "cumlogsumexp"}
_OF_KEYS = {"random_bits", "random_split", "random_fold_in"}
_MAKES_KEYS = {"random_fold_in", "random_seed", "random_split", "random_wrap", "threefry2x32"}
_ROUNDED_BY_MACHINE = {"exp", "exp2", "expm1", "log", "log1p", "logistic", "tanh", "sin", "cos"}
_ROUNDED_BY_MACHINE |= {"tan", "pow", "erf", "erf_inv", "erfc", "sinh", "cosh", "atan2"}

_SCATTER = Complaint(
    "scatter-order",
    ("runs",),
    "elements that are updated more than once are updated in the order in which threads arrive.",
)
_CALLBACK = Complaint(
    "callback",
    ("runs", "machines"),
    "the value comes from Python, which the program does not determine; nor is the number or the "
    "order of the calls fixed.",
)
_STATEFUL = Complaint("stateful-random", ("runs",), "it draws from a generator without a key.")
_OPAQUE_KERNEL = Complaint(
    "opaque-kernel",
    ("runs", "machines", "devices"),
    "nothing is known about the order of operations in a kernel from elsewhere.",
)
_SUM_ORDER = "the compiler orders a floating-point sum as suits the device and the shapes"
_SUM = Complaint("sum-order", ("devices", "batch sizes"), f"{_SUM_ORDER}.")
_SUM_OVER_DEVICES = Complaint(
    "sum-order", ("devices",), "the order of a sum over devices follows their number and topology."
)
_NCCL = Complaint(
    "nccl",
    ("runs", "machines"),
    "NCCL chooses how to add over GPUs, and NVLink SHARP adds in an order of its own every time.",
)
_PRECISION = Complaint(
    "matmul-precision",
    ("devices",),
    "without a precision, float32 is multiplied as bfloat16 on a TPU, as TF32 on most GPUs, and "
    "as float32 on a CPU.",
)
_SORT = Complaint("unstable-sort", ("devices",), "the order of equal elements is not defined.")
_TOP_K = Complaint(
    "approximate-top-k", ("devices",), "it is approximate on a TPU, and exact elsewhere."
)
_AXIS_INDEX = Complaint(
    "axis-index-key",
    ("devices",),
    "the key depends on the index of the device, so another number of devices draws other numbers.",
)
_RBG = Complaint(
    "rbg", ("devices",), "keys of this kind draw other numbers on a CPU, a GPU and a TPU."
)
_RBG_SHARDED = Complaint(
    "rbg",
    ("devices",),
    "keys of this kind draw other numbers on a CPU, a GPU and a TPU, and under "
    "xla_tpu_spmd_rng_bit_generator_unsafe with every sharding.",
)
_RBG_VMAP = Complaint(
    "rbg-vmap",
    ("devices", "batch sizes"),
    "under vmap, one draw with the first key replaces all draws, so a number depends on the "
    "examples next to it, and in a shard_map on the number of devices.",
)
_THREEFRY = Complaint(
    "threefry",
    ("settings",),
    "jax_threefry_partitionable is off, and with it on the numbers are others.",
)
_INSTRUCTIONS = Complaint(
    "instruction-set",
    ("machines",),
    "XLA compiles for the instructions that the CPU has, and fused multiply-adds round once.",
)


def complaints(
    operation: Operation, platform: str, environment: Environment, sharded: bool
) -> Iterator[Complaint]:
    """Everything that one operation is free to do differently."""
    name, equation = operation.name, operation.equation
    gpu = platform == "cuda"
    if name in _CALLBACKS and not (equation.params.get("ordered") and not equation.outvars):
        yield _CALLBACK
    if name == "rng_uniform":
        yield _STATEFUL
    if name in _OPAQUE or (name == "atomic_rmw" and gpu):
        yield _OPAQUE_KERNEL
    yield from _of_random(operation, environment)
    if operation.in_kernel:  # which neither XLA nor its libraries reorder
        return
    if gpu and not environment.excludes_nondeterministic and _collides(operation):
        yield _SCATTER
    if gpu and (name in _PRODUCTS or name.startswith("dot_product_attention")):
        yield from _of_kernel_choice(name, environment)
    if name in _PRODUCTS and _is_default_precision(equation):
        yield _PRECISION
    yield from _of_sums(operation, gpu and not environment.nccl_pinned, sharded)
    unstable = equation.params.get("is_stable") is False
    keys = equation.params.get("num_keys")
    if unstable and (name == "top_k" or (name == "sort" and keys < len(equation.invars))):
        yield _SORT
    if name == "approx_top_k":
        yield _TOP_K
    by_machine = platform == "cpu" and not environment.isa_pinned
    if by_machine and name in _ROUNDED_BY_MACHINE and _is_rounded(equation):
        yield _INSTRUCTIONS


def _of_kernel_choice(name: str, environment: Environment) -> Iterator[Complaint]:
    kinds = {"conv_general_dilated": "convolution", "dot_general": "matrix product"}
    kind = kinds.get(name, "attention" if "attention" in name else "product")
    if environment.autotuning:
        message = f"XLA times several kernels for the {kind} and takes the fastest"
        message += (
            ""
            if environment.excludes_nondeterministic
            else ", which may be one that adds atomically"
        )
        between = environment.autotuning
        if not environment.excludes_nondeterministic and kind in ("convolution", "attention"):
            between = ("runs", "machines")
        yield Complaint("autotuning", between, f"{message}.")
    elif not environment.excludes_nondeterministic and kind in ("convolution", "attention"):
        yield Complaint("autotuning", ("runs",), f"cuDNN's kernels for the {kind} add atomically.")


def _of_random(operation: Operation, environment: Environment) -> Iterator[Complaint]:
    name, equation = operation.name, operation.equation
    keys = [atom.aval for atom in equation.invars if _is_key(atom.aval)]
    kind = str(keys[0].dtype) if keys else ""
    if operation.of_device and name in _MAKES_KEYS:
        yield _AXIS_INDEX
    # A split with keys of the kind rbg is as with threefry; only unsafe_rbg's is not.
    draws = name == "random_bits" and "rbg" in kind
    draws = draws or (name in ("random_split", "random_fold_in") and "urbg" in kind)
    if draws and keys[0].ndim:
        yield _RBG_VMAP
    default = "DEFAULT" in str(equation.params.get("algorithm", ""))
    if draws or (name == "rng_bit_generator" and default):
        yield _RBG_SHARDED if environment.rbg_follows_sharding else _RBG
    threefry = "fry" in kind or ("<rbg" in kind and name != "random_bits")
    partitionable = jax.config.jax_threefry_partitionable  # type: ignore[attr-defined]  # not annotated
    if not partitionable and threefry and name in _OF_KEYS:
        yield _THREEFRY


def _of_sums(operation: Operation, nccl: bool, sharded: bool) -> Iterator[Complaint]:
    equation, name = operation.equation, operation.name
    if not _is_rounded(equation):
        return
    if name in _OVER_DEVICES:
        yield _SUM_OVER_DEVICES
        if nccl:
            yield _NCCL
    elif (name in _PRODUCTS or name in _SUMS) and _terms(equation) > 2:  # two terms commute
        yield _SUM
        if nccl and sharded:  # the partitioner may add over devices
            yield _NCCL


def _terms(equation: Any) -> float:
    """The number of terms of one element of a sum, as far as it is known."""
    parameters, shape = equation.params, equation.invars[0].aval.shape
    if equation.primitive.name == "dot_general":
        axes = parameters["dimension_numbers"][0][0]
    elif equation.primitive.name in ("reduce_sum", "reduce_prod"):
        axes = parameters["axes"]
    elif equation.primitive.name.startswith("cum"):
        axes = (parameters["axis"],)
    else:
        return math.inf
    return math.prod(shape[axis] for axis in axes)


def _collides(operation: Operation) -> bool:
    """Whether the order of the updates of a scatter makes a difference, if any collide."""
    name, equation = operation.name, operation.equation
    if name == "select_and_scatter_add":
        return True
    if not name.startswith("scatter") or name in ("scatter-min", "scatter-max", "scatter_min"):
        return False
    if name == "scatter_max" or equation.params.get("unique_indices"):
        return False
    if math.prod(equation.invars[1].aval.shape[:-1]) == 1:  # one update
        return False
    # The last of several assignments stays; sums of integers are the same in any order.
    return name == "scatter" or _is_rounded(equation)


def _is_default_precision(equation: Any) -> bool:
    precision = equation.params.get("precision")
    chosen = precision if isinstance(precision, tuple) else (precision,)
    default = all(str(each).rpartition(".")[2] in ("None", "DEFAULT") for each in chosen)
    return default and all(atom.aval.dtype == jnp.float32 for atom in equation.invars[:2])


def _is_rounded(equation: Any) -> bool:
    return any(
        hasattr(atom.aval, "dtype") and jnp.issubdtype(atom.aval.dtype, jnp.inexact)
        for atom in equation.outvars
    )


def _is_key(aval: Any) -> bool:
    return hasattr(aval, "dtype") and jnp.issubdtype(aval.dtype, jax.dtypes.prng_key)
