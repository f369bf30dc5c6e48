"""Dropout, bias and residual in one pass: a Pallas TPU kernel that makes the mask in registers.

`_dropout_kernel_gpu` does the same on GPUs, without a bias.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jdropout import _dropout_kernel_gpu, _kernels, _law
from jdropout._draw import Description, Draw
from jdropout._implementation import LANES

_LARGEST_TILE = (256, 512)
"""Rows and columns, estimated by `benchmarks/compiled.py`."""
_TILE_ELEMENTS = 2**17
"""Smaller tiles of several leading indices are taken together."""


def kernel_formula(
    draw: Draw,
    x: jax.Array,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
) -> jax.Array:
    """``residual + dropout(x + bias)``, where a bias and a residual may be missing."""
    if 0 in x.shape:
        return x if residual is None else residual
    operand, factor = _kernels.operand(draw), draw.scale(np.dtype("float32"))
    return _apply(x.dtype, _kernels.described(draw), operand, factor, x, bias, residual)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _apply(
    dtype: Any,
    description: Description,
    operand: jax.Array,
    factor: jax.Array,
    x: jax.Array,
    bias: jax.Array | None,
    residual: jax.Array | None,
) -> jax.Array:
    shape = x.shape
    if len(shape) == 2:
        x, residual = x[None], None if residual is None else residual[None]
    *lead, rows, columns = x.shape
    tile = [
        min(pl.cdiv(size, unit) * unit, largest)
        for size, unit, largest in zip(
            (rows, columns), (_law.TILE_ROWS, LANES), _LARGEST_TILE, strict=True
        )
    ]
    together = max(1, min(lead[-1], _TILE_ELEMENTS // (tile[0] * tile[1])))
    block = (*(None for _ in lead[:-1]), together, *tile)
    grid = tuple(pl.cdiv(size, part or 1) for size, part in zip(x.shape, block, strict=True))
    whole = pl.BlockSpec(block, lambda *index: index)
    operands = {"dropout": operand, "factor": factor.reshape(1, 1), "x": x}
    specs = {"dropout": _kernels.SCALARS, "factor": _kernels.SCALARS, "x": whole}
    if bias is not None:
        operands["bias"] = bias.reshape(1, columns)
        specs["bias"] = pl.BlockSpec((1, tile[1]), lambda *index: (0, index[-1]))
    if residual is not None:
        operands["residual"], specs["residual"] = residual, whole
    cuda = None
    # Mosaic GPU finds no layout for a broadcast bias.
    if _dropout_kernel_gpu.COMPILES and bias is None:
        cuda = functools.partial(_dropout_kernel_gpu.run, description)
    y = _kernels.call(
        "dropout",
        functools.partial(_kernel, description, len(shape)),
        operands,
        cuda=cuda,
        grid=grid,
        in_specs=[specs],
        out_specs=whole,
        out_shape=jax.ShapeDtypeStruct(x.shape, dtype if residual is None else residual.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=["parallel"] * len(grid)),
    )
    return y.reshape(shape)


def _forward(
    dtype: Any,
    description: Description,
    operand: Any,
    factor: Any,
    x: Any,
    bias: Any,
    residual: Any,
) -> tuple[jax.Array, Any]:
    y = _apply(dtype, description, operand, factor, x, bias, residual)
    return y, (operand, factor, bias, residual is not None)


def _backward(dtype: Any, description: Description, saved: Any, y_bar: jax.Array) -> Any:
    operand, factor, bias, has_residual = saved
    x_bar = _apply(dtype, description, operand, factor, y_bar.astype(dtype), None, None)
    bias_bar = None
    if bias is not None:
        axes = tuple(range(x_bar.ndim - 1))
        bias_bar = x_bar.astype(jnp.float32).sum(axes).reshape(bias.shape).astype(bias.dtype)
    return None, None, x_bar, bias_bar, y_bar if has_residual else None


_apply.defvjp(_forward, _backward)


def _kernel(description: Description, ndim: int, inputs: dict[str, Any], y: Any) -> None:
    index = tuple(pl.program_id(axis) for axis in range(max(ndim, 3)))
    together, rows, columns = inputs["x"].shape
    factor = inputs["factor"][0, 0]

    def visit(k: Any, _: None) -> None:
        lead = (*index[:-3], index[-3] * together + k)[-(ndim - 2) :] if ndim > 2 else ()
        # By slabs of rows, or the mask of a tile would not stay in registers.
        for slab in range(rows // _law.TILE_ROWS):
            at = (k, pl.ds(slab * _law.TILE_ROWS, _law.TILE_ROWS))
            row = index[-2] * (rows // _law.TILE_ROWS) + slab
            shape = (*(1 for _ in lead), _law.TILE_ROWS, columns)
            keep = _kernels.keep_tile(
                description, inputs["dropout"], shape, (*lead, row, index[-1])
            )
            x = inputs["x"][at]
            if "bias" in inputs:
                x = x + inputs["bias"][...].astype(x.dtype)
            x = jnp.where(keep, x.astype(jnp.float32) * factor, 0).astype(x.dtype)
            if "residual" in inputs:
                residual = inputs["residual"][at]
                x = residual + x.astype(residual.dtype)
            y[at] = x

    jax.lax.fori_loop(0, together, visit, None)
