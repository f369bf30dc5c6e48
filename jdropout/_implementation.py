"""The choice between XLA and Pallas kernels; imports no Pallas, which takes a third of a second."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from jdropout import _values
from jdropout._draw import Draw, Outcome

Implementation = Literal["xla", "pallas"]

LANES = 128
"""Columns of a TPU's tile."""


def check_implementation(implementation: Any) -> bool:
    """Whether the user wants a kernel."""
    if implementation is not None:
        _values.check_option("implementation", implementation, ("xla", "pallas"))
    return bool(implementation == "pallas")


def check_supported(arrays: dict[str, jax.Array | None], draw: Draw) -> None:
    """Raises if a kernel cannot do what is asked; it never does something else instead."""
    for name, x in arrays.items():
        if x is not None and x.dtype not in (jnp.float32, jnp.bfloat16):
            raise unsupported(f"{name} of dtype {x.dtype}. Convert it to float32 or bfloat16")
        if x is not None and any(jax.typeof(x).sharding.spec):
            raise unsupported(
                f"{name} with the sharding {jax.typeof(x).sharding.spec}. Call it in a "
                "jax.shard_map with check_vma=False"
            )
    if draw.outcome is not Outcome.DRAWN:
        return
    if draw.sample is not None:
        raise unsupported("a key of coupled samples. Pass sampling='independent' to mc_predict")
    layout = draw.description.layout
    assert layout is not None
    if len(draw.description.whole) < 2 or 1 in draw.description.whole[-2:]:
        shape = draw.description.whole
        raise unsupported(
            f"a mask of shape {shape}. Reshape the array to last two axes that are longer than 1"
        )
    if layout.phase != 0:
        raise unsupported(
            "a start within a group of rows. Start them, the second-to-last axis, at a Python "
            "multiple of 4"
        )


def unsupported(what_and_fix: str) -> ValueError:
    return ValueError(
        f"implementation='pallas' does not support {what_and_fix}, or pass implementation='xla'."
    )
