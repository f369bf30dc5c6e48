"""Dropout and residual in one pass on a GPU: a Pallas Mosaic GPU kernel.

It has been compiled for an H100, and its body interpreted; it has never been run. It copies tiles
with the Tensor Memory Accelerator, so it needs a Hopper GPU or a later one.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jdropout import _kernels, _law
from jdropout._draw import Description

_GROUPS, _COLUMNS = 4, 128
"""A tile of row groups. The compiler unrolls it: larger ones take longer to compile."""
_ALIGNMENT = 16
"""The TMA needs rows of a multiple of so many bytes."""
COMPILES = jax.__version_info__ >= (0, 10, 2)
"""Mosaic GPU in JAX 0.8 has no unsigned shifts, for example."""


def run(
    description: Description, operands: dict[str, jax.Array], *, interpret: bool = False
) -> jax.Array:
    """``residual + dropout(x)``; the residual may be missing.

    Arrays whose rows have a multiple of 16 bytes and fill their groups are read where they lie;
    others are copied, to pad them.

    Args:
      description: description of the draw.
      operands: what the TPU kernel takes, without a bias.
      interpret: if True, interpret the kernel's body over the same tiles; JAX cannot interpret the
        copies between them and memory.
    """
    *lead, rows, columns = operands["x"].shape
    arrays = [operands[name] for name in ("x", "residual") if name in operands]
    out = jax.ShapeDtypeStruct(arrays[-1].shape, arrays[-1].dtype)
    if out.size == 0:
        return jnp.zeros(out.shape, out.dtype)

    unit = _ALIGNMENT // min(array.dtype.itemsize for array in arrays)
    ragged = (-rows % _law.GROUP_ROWS, -columns % unit)
    arrays = [_in_groups(array, ragged) for array in arrays]
    out = jax.ShapeDtypeStruct(arrays[-1].shape, out.dtype)
    grid = (*lead, pl.cdiv(out.shape[1], _GROUPS), pl.cdiv(out.shape[3], _COLUMNS))

    call = _interpreted if interpret else _compiled
    kernel = functools.partial(_kernel, description, grid)
    y = call(kernel, grid, out, operands["dropout"], operands["factor"], *arrays)
    y = y.reshape(*lead, rows + ragged[0], columns + ragged[1])
    return y[..., :rows, :columns] if any(ragged) else y


def _compiled(
    kernel: Any, grid: tuple[int, ...], out: jax.ShapeDtypeStruct, *operands: jax.Array
) -> jax.Array:
    def one_tile(draw: Any, factor: Any, *arrays: Any) -> None:
        number = lax.axis_index("tile")

        def step(_: Any, *tiles: Any) -> None:
            kernel(number, draw, factor, *tiles)

        tile = _tile(out, grid, number)
        run = plgpu.emit_pipeline(
            step, grid=(1,), in_specs=[tile] * (len(arrays) - 1), out_specs=[tile]
        )
        run(*arrays)

    # One axis, since CUDA limits the others to 65535.
    call = plgpu.kernel(
        one_tile,
        out_type=out,
        grid=(math.prod(grid),),
        grid_names=("tile",),
        kernel_name="dropout",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    y: jax.Array = call(*operands)
    return y


def _interpreted(
    kernel: Any, grid: tuple[int, ...], out: jax.ShapeDtypeStruct, *operands: jax.Array
) -> jax.Array:
    def one_tile(*refs: Any) -> None:
        kernel(pl.program_id(0), *refs)

    tile = _tile(out, grid, 0)
    y: jax.Array = pl.pallas_call(
        one_tile,
        grid=(math.prod(grid),),
        in_specs=[pl.BlockSpec()] * 2 + [tile] * (len(operands) - 2),
        out_specs=tile,
        out_shape=out,
        interpret=True,
    )(*operands)
    return y


def _tile(out: jax.ShapeDtypeStruct, grid: tuple[int, ...], first: Any) -> pl.BlockSpec:
    def locate(step: Any) -> tuple[Any, ...]:
        lead, group, column = _unravel(first + step, (out.shape[0], *grid[-2:]))
        return lead, group, 0, column

    return plgpu.BlockSpec((None, _GROUPS, _law.GROUP_ROWS, _COLUMNS), locate)


def _kernel(
    description: Description,
    grid: tuple[int, ...],
    number: Any,
    draw: Any,
    factor: Any,
    *tiles: Any,
) -> None:
    x_tile, *residual_tile, y_tile = tiles
    index = _unravel(number, grid)[-len(description.whole) :]
    shape = (*(1 for _ in index[:-2]), _GROUPS * _law.GROUP_ROWS, _COLUMNS)
    masks = _kernels.keep_tile(description, draw, shape, index, _law.by_lane)
    for lane, keep in enumerate(masks):
        x = x_tile[:, lane]
        x = jnp.where(keep, x.astype(jnp.float32) * factor[0, 0], np.float32(0)).astype(x.dtype)
        if residual_tile:
            residual = residual_tile[0][:, lane]
            x = residual + x.astype(residual.dtype)
        y_tile[:, lane] = x


def _in_groups(array: jax.Array, ragged: tuple[int, int]) -> jax.Array:
    """The array in the shape (leading indices, groups of rows, lanes, columns)."""
    if any(ragged):
        none = [(0, 0)] * (array.ndim - 2)
        array = jnp.pad(array, [*none, *((0, size) for size in ragged)])
    *lead, rows, columns = array.shape
    return array.reshape(math.prod(lead), rows // _law.GROUP_ROWS, _law.GROUP_ROWS, columns)


def _unravel(number: Any, sizes: tuple[int, ...]) -> tuple[Any, ...]:
    index = []
    for size in sizes[:0:-1]:
        index.append(lax.rem(number, np.int32(size)))
        number = lax.div(number, np.int32(size))
    return (number, *reversed(index))
