"""Keys from (root key, step, microbatch, site), with no random state to save or restore.

Read from the top: `site_key` is a `step_key` followed by `at_site`. Every level is one
cipher block under the words of the level above, at a counter that nothing else uses with
these words:

- a step sets the counter's highest bit;
- a microbatch, or a site's index, has a tag as its upper half;
- a site's name gives 64 bits of its SHA-256, whose upper half is neither a tag nor 0, the
  upper half that `jax.random.fold_in` and `split` use. (It equals the counter of a
  step below the same words with probability 2^-64.)

`docs/keys.md` states this law; changing it requires a new version.
"""

import functools
import hashlib
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jdropout import _checks, _key_kinds
from jdropout._batch import in_batch
from jdropout._law import MASK_TAG, absorb, key_words, like_key
from jdropout._samples import stratified_key
from jdropout._threefry import threefry2x32
from jdropout._typing import Index, Key, Site, WordPair
from jdropout._values import as_integer, check_index, type_name

__all__ = ["at_site", "in_batch", "site_key", "step_key", "stratified_key"]
_INDEX_TAG = 0x6A646978  # "jdix"
_WORDS_TAG = 0x6A647764  # "jdwd": for keys of more than two words
_STEP_BIT = 0x80000000
_RESERVED = (0, MASK_TAG, _INDEX_TAG, _WORDS_TAG)


def site_key(root: Key, *, step: Index, site: Site, microbatch: Index = 0) -> jax.Array:
    """Returns the key of one dropout site in one training step, a pure function of its arguments.

    A training loop that gets its keys from here needs no random state: after a restart, step
    1000 has the masks that it would have had anyway. Two sites of one step get the same key
    only by chance, as random 64-bit numbers do (any two of a million sites: 3e-8), and for keys
    of two words never if they differ only in a trailing index. Keys of different steps or roots
    also coincide only by chance, and so do these keys and the results of ``fold_in`` or
    ``split`` on the root. Applying ``fold_in`` or ``split`` to a key from here never gives the
    key of a site below it.

    Args:
      root: PRNG key, typed or raw; the same one for the whole training.
      step: number of the training step, an integer or a (traced) integer scalar, at least 0.
      site: which dropout it is: a name, an index (an integer or a (traced) integer scalar below
        2**32, such as a layer's in a scan), or a tuple of names and indices.
      microbatch: number of the microbatch within the step, an integer or a (traced) integer
        scalar below 2**32.

    Returns:
      A key of root's kind.

    Raises:
      TypeError: if an argument has the wrong type.
      ValueError: if a number is negative or too large, the root is missing or a batch of keys,
        or the site is an empty tuple.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> from jdropout.keys import site_key
      >>> root = jax.random.key(0)
      >>> key = site_key(root, step=1000, site=("decoder", 3, "mlp"))
      >>> y = jdropout.dropout(key, jnp.ones((2, 8)), 0.1)
      >>> site_key(root, step=1001, site=("decoder", 3, "mlp")) == key
      Array(False, dtype=bool)

    References:
      The key law, in the documentation; Salmon, Moraes, Dror and Shaw, "Parallel random
      numbers: as easy as 1, 2, 3" (SC 2011), section 2, for keys and counters.
    """
    return at_site(step_key(root, step=step, microbatch=microbatch), site)


def step_key(root: Key, *, step: Index, microbatch: Index = 0) -> jax.Array:
    """Returns the key that all sites of a training step derive from: the first half of `site_key`.

    ``at_site(step_key(root, step=step), site)`` equals
    ``site_key(root, step=step, site=site)``.

    Args:
      root: PRNG key, typed or raw; the same one for the whole training.
      step: number of the training step, an integer or a (traced) integer scalar, at least 0.
      microbatch: number of the microbatch within the step, an integer or a (traced) integer
        scalar below 2**32.

    Returns:
      A key of root's kind.

    Raises:
      TypeError: if an argument has the wrong type.
      ValueError: if a number is negative or too large, or the root is missing or a batch of
        keys.

    Example:
      >>> import jax
      >>> from jdropout.keys import at_site, site_key, step_key
      >>> root = jax.random.key(0)
      >>> key = step_key(root, step=7)  # once a step
      >>> at_site(key, "hidden") == site_key(root, step=7, site="hidden")
      Array(True, dtype=bool)

    References:
      The key law, in the documentation; Salmon, Moraes, Dror and Shaw, "Parallel random
      numbers: as easy as 1, 2, 3" (SC 2011), section 2, for keys and counters.
    """
    root = _checks.check_parent_key(root, "root")
    high, low = _check_count("step", step, bits=63)
    index = _index_counter("microbatch", microbatch)
    return _below(root, ((high | np.uint32(_STEP_BIT), low), index))


def at_site(key: Key, site: Site) -> jax.Array:
    """Returns the key of a site below another key: the second half of `site_key`.

    Paths compose: ``at_site(key, ("decoder", 3))`` is ``at_site(at_site(key, "decoder"), 3)``.

    Args:
      key: PRNG key, typed or raw, of a step or of a site that contains this one.
      site: which dropout it is: a name, an index (an integer or a (traced) integer scalar below
        2**32, such as a layer's in a scan), or a tuple of names and indices.

    Returns:
      A key of the same kind.

    Raises:
      TypeError: if an argument has the wrong type.
      ValueError: if an index is negative or too large, the key is missing or a batch of keys,
        or the site is an empty tuple.

    Example:
      >>> import jax
      >>> from jdropout.keys import at_site
      >>> key = jax.random.key(0)
      >>> a, b = (at_site(key, ("layer", index)) for index in range(2))
      >>> a == b
      Array(False, dtype=bool)

    References:
      The key law, in the documentation; Salmon, Moraes, Dror and Shaw, "Parallel random
      numbers: as easy as 1, 2, 3" (SC 2011), section 2, for keys and counters.
    """
    counters = tuple(
        _name_counter(part) if isinstance(part, str) else _index_counter("site", part)
        for part in _check_site(site)
    )
    return _below(_checks.check_parent_key(key, "key"), counters)


@functools.lru_cache(maxsize=4096)
def _name_counter(name: str) -> WordPair:
    """The first 64 bits of the name's digest whose upper half is not reserved."""
    words = np.frombuffer(hashlib.sha256(name.encode()).digest(), ">u4").astype(np.uint32)
    pairs = zip(words[::2], words[1::2], strict=True)
    return next(pair for pair in pairs if pair[0] not in _RESERVED)


def _index_counter(name: str, index: Index) -> WordPair:
    return cast("WordPair", (np.uint32(_INDEX_TAG), _check_count(name, index, bits=32)[1]))


def _below(key: Key, counters: tuple[WordPair, ...]) -> jax.Array:
    return cast("jax.Array", _key_kinds.derived(key, lambda key: _descend(key, counters)))


@jax.jit
def _descend(key: Key, counters: tuple[WordPair, ...]) -> jax.Array:
    words = key_words(key)
    for high, low in counters:
        state = threefry2x32(absorb(words), (jnp.uint32(high), jnp.uint32(low)))
        child = list(state)
        for number in range(1, -(-words.size // 2)):
            child += threefry2x32(state, (jnp.uint32(_WORDS_TAG), jnp.uint32(number)))
        # Without the barrier XLA:CPU fuses the levels, and takes minutes to compile two stacked
        # names' keys for a vector of indices and a traced step.
        words = lax.optimization_barrier(
            lax.concatenate([word.reshape(1) for word in child[: words.size]], 0)
        )
    return like_key(words, key)


def _check_count(name: str, count: Any, bits: int) -> WordPair:
    """Returns an integer in [0, 2**bits) as two 32-bit words."""
    number = check_index(name, count)
    if isinstance(number, jax.Array):
        low = number.astype(jnp.uint32)
        if number.dtype.itemsize < 8:
            return jnp.zeros_like(low), low
        return lax.shift_right_logical(number, lax.full_like(number, 32)).astype(jnp.uint32), low
    if not 0 <= number < 2**bits:
        raise ValueError(
            f"{name} must be a whole number of at least 0 and below 2**{bits}, got {count!r}."
            " Count from 0."
        )
    # NumPy scalars: making jnp ones would dispatch an operation each in an eager call.
    return cast("WordPair", (np.uint32(number >> 32), np.uint32(number & 0xFFFFFFFF)))


def _check_site(site: Any) -> tuple[Any, ...]:
    """Returns the parts of a site: names, and indices, which are range-checked later."""
    parts = site if isinstance(site, tuple) else (site,)
    if not parts:
        raise ValueError(
            "site must not be empty, got (). Name the dropout, such as site='hidden' or "
            "site=('layer', 3)."
        )
    for part in parts:
        traced = isinstance(part, jax.core.Tracer) and jnp.issubdtype(part.dtype, np.integer)
        if not (isinstance(part, str) or traced or as_integer(part) is not None):
            raise TypeError(
                f"site must be a name, an index or a tuple of them, got {part!r} of type "
                f"{type_name(part)}. Write it as a string or an integer, such as ('layer', 3)."
            )
    return parts
