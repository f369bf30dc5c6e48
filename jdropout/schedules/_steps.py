"""The type of a schedule, and how schedules count steps."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jdropout import _checks
from jdropout._typing import ArrayLike, Rate
from jdropout._values import as_integers, check_integer

Schedule: TypeAlias = Callable[[ArrayLike], jax.Array]
"""Function from a step to a rate, a float32 scalar in [0, 1] for `jdropout.dropout`.

A step is a number or a (traced) scalar array, integer or floating-point. Integer steps are
compared as integers, never rounded to float32. Steps below 0 count as 0.
"""


def since(step: ArrayLike, begin: int) -> jax.Array:
    """The number of steps since `begin`: int32, or float32 for a fractional step.

    The step is first clipped to [0, MAX_STEP]. Whole parts are subtracted as integers, which makes
    the sign exact: float32 cannot hold every integer above 2**24.
    """
    step = check_step(step)
    fractional = jnp.issubdtype(step.dtype, jnp.floating)
    if step.dtype.itemsize < 4:  # too narrow for the bounds
        step = step.astype(jnp.float32 if fractional else jnp.int32)
    step = step.clip(0, MAX_STEP)
    whole = step.astype(jnp.int32)
    since = jnp.asarray(whole - np.int32(begin))
    if not fractional:
        return since
    return since.astype(jnp.float32) + (step - whole.astype(step.dtype)).astype(jnp.float32)


def as_float32(name: str, rate: Rate) -> np.float32 | jax.Array:
    checked = _checks.check_rate(rate, name)
    return checked.astype(jnp.float32) if isinstance(checked, jax.Array) else np.float32(checked)


MAX_STEP = 2**31 - 128
"""The largest int32 that is a float32; counting stops there in both."""


def check_step(step: Any) -> jax.Array | np.ndarray:
    try:
        array = step if isinstance(step, jax.Array) else np.asarray(step)
    except (TypeError, ValueError):  # a list that holds a traced array, or lists of two lengths
        raise TypeError(
            f"step must be a number, got {step!r}. Pass the number of the training step."
        ) from None
    if not (jnp.issubdtype(array.dtype, jnp.integer) or jnp.issubdtype(array.dtype, jnp.floating)):
        raise TypeError(
            f"step must be a number, got {step!r} of dtype {array.dtype}."
            " Pass the number of the training step."
        )
    if array.shape != ():
        raise ValueError(
            f"step must be a scalar, got an array of shape {array.shape}. For the rates of many "
            "steps use jax.vmap(schedule)(steps)."
        )
    if not isinstance(array, jax.core.Tracer) and array != array:
        raise ValueError(f"step must be a number, got {step}. Count the steps from 0.")
    return array


def check_num_steps(num_steps: Any, name: str, *, least: int = 1, before: int = 0) -> int:
    """Returns a number of steps that, with the steps ``before``, stays within MAX_STEP."""
    number = check_integer(name, num_steps)
    if number < least:
        raise ValueError(
            f"{name} must be at least {least}, got {number}. Schedules count steps from 0."
        )
    if before + number > MAX_STEP:
        raise ValueError(
            f"{name} must end at step {MAX_STEP} at the latest, which is as far as int32 and "
            f"float32 can count, got {number}{f' after {before}' if before else ''}."
            " Count epochs instead of steps."
        )
    return number


def check_boundaries(boundaries: Any, of: str, count: int) -> tuple[int, ...]:
    """Returns the steps at which ``count`` pieces change, one less than there are pieces."""
    array = isinstance(boundaries, np.ndarray | jax.Array) and as_integers(boundaries) is not None
    if not (array or isinstance(boundaries, Sequence)):
        raise TypeError(
            f"boundaries must be a sequence of steps, got {boundaries!r}. Write [step] for one."
        )
    steps = tuple(
        check_num_steps(step, f"boundaries[{index}]") for index, step in enumerate(boundaries)
    )
    if len(steps) != count - 1:
        raise ValueError(
            f"boundaries must be one less than {of}, got {len(steps)} for {count}: a step for "
            "every change from one to the next."
        )
    if list(steps) != sorted(set(steps)):
        raise ValueError(f"boundaries must increase, got {steps}. Sort them.")
    return steps
