"""The Threefry-2x32 block cipher: uint32 in, uint32 out, nothing else."""

import jax
import numpy as np
from jax import lax

from jdropout._typing import WordPair

# Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011):
# rotation distances of table 2, and the key-schedule parity constant of Skein.
_ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
_PARITY = np.uint32(0x1BD11BDA)


def threefry2x32(key: WordPair, counter: WordPair, *, rounds: int = 20) -> WordPair:
    """Encrypts 64-bit counter blocks under a 64-bit key.

    Args:
      key: two uint32 arrays, of one shape that broadcasts to the counter's.
      counter: two uint32 arrays of one shape.
      rounds: number of rounds; 20 is the recommended strength, 13 the published minimum.

    Returns:
      Two uint32 arrays of the counter's shape, all 64 bits of them usable.

    References:
      Salmon et al. (2011), sections 2.3 and 4.2; known answers in Random123's ``kat_vectors``.
    """
    key0, key1 = key
    schedule = (key0, key1, key0 ^ key1 ^ _PARITY)
    x0, x1 = counter[0] + schedule[0], counter[1] + schedule[1]
    for step in range(rounds):
        x0 = x0 + x1
        x1 = x0 ^ _rotate_left(x1, _ROTATIONS[step % 8])
        if step % 4 == 3:
            injection = step // 4 + 1
            x0 = x0 + schedule[injection % 3]
            x1 = x1 + (schedule[(injection + 1) % 3] + np.uint32(injection))
    return x0, x1


def _rotate_left(x: jax.Array, distance: int) -> jax.Array:
    left = lax.shift_left(x, np.uint32(distance))
    return left | lax.shift_right_logical(x, np.uint32(32 - distance))
