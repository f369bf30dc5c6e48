"""What the nnx and linen modules share."""

from typing import Any

import jax

from jdropout._checks import check_deterministic, check_rate
from jdropout._typing import Rate


def check_module_rate(rate: Any) -> float:
    """Returns the rate of a module, which is static: an array would be a leaf of its state."""
    if isinstance(rate, jax.Array):
        raise TypeError(
            f"rate must be a Python number, got an array of shape {rate.shape} and dtype "
            f"{rate.dtype}: as a module attribute it would become a leaf that an optimizer can "
            "train. For a scheduled rate call jdropout.dropout(key, x, rate) in the model."
        )
    checked = check_rate(rate)
    assert isinstance(checked, float)  # arrays were turned away above
    return checked


def check_module_flag(deterministic: Any) -> bool | jax.Array:
    """Returns a flag as a bool wherever its value is known, as Flax's own modules see it."""
    if isinstance(deterministic, int):  # Flax takes 0 and 1 as well
        deterministic = bool(deterministic)
    flag = check_deterministic(deterministic)
    return flag if isinstance(flag, jax.core.Tracer) else bool(flag)


def draws_mask(rate: Rate, deterministic: bool | jax.Array) -> bool:
    """Whether a call draws a mask, and so takes a key from its stream, exactly as in Flax."""
    if deterministic is True:
        return False
    static_rate = None if isinstance(rate, jax.Array) else rate
    return static_rate != 0 and not (static_rate == 1 and deterministic is False)
