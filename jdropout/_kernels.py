"""What the Pallas TPU kernels share: the mask of a tile, and how a kernel is called."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jdropout import _law, _threshold
from jdropout._draw import Description, Draw

SCALARS = pl.BlockSpec(memory_space=pltpu.SMEM)
"""An operand of numbers that all tiles need: `numbers`, or an array of more than two axes."""


def numbers(*scalars: Any, dtype: Any) -> jax.Array:
    """A row of numbers, which `jax.vmap` can put into one with an axis in front."""
    return jnp.stack([jnp.asarray(x, dtype) for x in scalars])[None]


def described(draw: Draw) -> Description:
    """What a kernel knows of a draw when it is compiled."""
    flagged = draw.deterministic is not None
    return draw.description._replace(threshold=None) if flagged else draw.description


def operand(draw: Draw) -> jax.Array:
    """All that a kernel needs of a draw besides its description, as `numbers`."""
    threshold = draw.threshold()
    if draw.deterministic is not None:
        threshold = _threshold.keep_all_if(draw.deterministic, threshold)
    low = 0 if threshold.low is None else threshold.low
    assert isinstance(draw.key, jax.Array)  # see with_mask_keys()
    origin = (0, 0) if draw.origin is None else draw.origin[:2]
    others = numbers(threshold.high, low, *origin, dtype=jnp.uint32)
    return jnp.concatenate([draw.key[None], others], axis=1)


def keep_tile(
    description: Description,
    operand: Any,
    shape: tuple[int, ...],
    index: tuple[Any, ...],
    law: Callable[..., Any] = _law.in_registers,
) -> Any:
    """The mask of the tile of ``shape`` at ``index * shape`` in a draw, two-dimensional.

    Args:
      description: the draw as `described`.
      operand: reference to the draw's `operand`.
      shape: shape of a tile; all but the last two sizes are 1.
      index: number of the tile along every axis.
      law: what makes the mask, in its own form.
    """
    *keys, high, low, first_high, first_low = (operand[0, k] for k in range(operand.shape[1]))
    # A constant is cheaper than a number in a register.
    threshold = description.threshold or _threshold.Threshold(high, low if len(keys) > 2 else None)
    tile = tuple(1 if n == 1 else size for n, size in zip(description.whole, shape, strict=True))
    layout, origin = _law.locate(description.whole, tile, None, index)
    assert origin is not None
    origin = _law.moved(origin, first_high, first_low)
    return law([*zip(keys[::2], keys[1::2], strict=True)], threshold, layout, origin)


def call(
    name: str,
    kernel: Callable[..., None],
    *operands: Any,
    cuda: Callable[..., Any] | None = None,
    **options: Any,
) -> Any:
    """Runs a kernel: compiled on a TPU, and interpreted, slowly, on other platforms.

    ``cuda`` takes its place on CUDA GPUs.
    """

    def run(*operands: Any, interpret: bool = False) -> Any:
        # Mosaic has no 64-bit integers, which literals would be.
        with jax.enable_x64(False):
            called = pl.pallas_call(kernel, name=name, interpret=interpret, **options)
            return called(*operands)

    interpreted = functools.partial(run, interpret=True)
    others = {} if cuda is None else {"cuda": cuda}
    return lax.platform_dependent(*operands, tpu=run, default=interpreted, **others)
