"""Audits the dropout of a function.

`program` traces the function. While it does, `jdropout._record` records the calls; afterwards
`dataflow` finds them in the jaxpr and, by `numbering` its values, where their keys come from.
`places` and `masks` follow the masks of other libraries to the arrays that they zero. `describe`
turns all of this into the sites of a `report`, and `findings` holds the rules that turn sites into
findings.
"""

import functools
from collections.abc import Callable
from typing import Any

from jdropout._audit.report import AuditReport


def audit(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> AuditReport:
    """Traces a function and reports every dropout site in it, with what is wrong about each.

    Nothing is run: the function and everything it calls are traced as by `jax.jit`, whether
    compiled before or not. A site is a call of this library that drops, or a mask of
    `jax.random.bernoulli` that zeroes something, as in the dropout of Flax, Equinox and Haiku.
    A site in a loop counts once, and a mask that the backward pass recomputes does not count
    again. For other libraries only masks are visible, so a rate of 0 is not seen.

    The findings are:

    - ``key-reused``: two sites use one key, so their masks are correlated or equal. Two
      branches of a conditional may share a key, and so may parts of a larger mask (``start``);
    - ``same-mask``: two sites have the same mask because keys that were derived in different
      ways are equal;
    - ``key-independent-of-step``: the key depends on no argument, or there is an argument such
      as ``step`` or ``state.step`` and the key does not depend on it, so every step has the
      same mask. A key that the function also advances and returns counts as new in each step; a
      random stream of Flax does so only if its count is returned or stays in a module;
    - ``key-independent-of-iteration``: all iterations of a loop have the same mask;
    - ``rate-zero``, ``rate-one``: nothing, or everything, is dropped in training;
    - ``off-while-others-are-on``: a flag switches a site off that would drop, and that is on
      nowhere else in the program, while other sites drop;
    - ``on-in-evaluation``: dropout is on, and not differentiated, under a function with a name
      such as ``evaluate``, ``predict`` or ``test_step`` (unless the name contains ``mc``,
      ``bayesian``, ``uncertainty`` or ``train``);
    - ``shared-over-devices``: in a ``shard_map`` the input differs between devices along some
      mesh axis, but the key does not, and no ``start`` is given;
    - ``shared-over-batch``, ``shared-over-heads``: all examples, or all heads of an attention,
      have the same mask. The batch is the first axis, unless an argument such as ``batch_axis``
      says otherwise, or the axis of a ``vmap``; in attention the heads come next.

    Args:
      fn: function of arrays, pytrees and Flax modules, such as a training step.
      *args: positional arguments of `fn`: arrays, `jax.ShapeDtypeStruct`, numbers and anything
        else it takes. Pass keys and the step as small arrays with known values, and the audit
        compares keys by value. Integers are traced where possible, since they may be steps or
        seeds; everything else is static.
      **kwargs: keyword arguments of `fn`.

    Returns:
      An `AuditReport`, whose ``sites`` and ``findings`` are tuples; it prints as a table.

    Raises:
      TypeError: if `fn` is not callable.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> def loss(key, x):
      ...     x = jdropout.dropout(key, x, 0.5)
      ...     return jdropout.dropout(key, x, 0.1).sum()  # the same key again
      >>> report = jdropout.audit(loss, jax.random.key(0), jnp.ones((8, 16)))
      >>> [finding.code for finding in report.findings]
      ['key-reused']
      >>> report.sites[1].rate, report.sites[1].shape, report.sites[1].key_sources
      (0.1, (8, 16), ('key',))

    References:
      The findings are the mistakes in the table "What goes wrong with dropout" in the
      documentation.
    """
    if not callable(fn):
        raise TypeError(f"fn must be a function, got {type(fn).__name__}. Pass the step itself.")
    # Imported here: jax.extend takes longer to import than the rest of this library.
    from jdropout._audit.describe import describe
    from jdropout._audit.findings import find
    from jdropout._audit.program import trace

    program = trace(fn, args, kwargs)
    named = fn.func if isinstance(fn, functools.partial) else fn
    name = getattr(named, "__name__", type(named).__name__)
    sites = describe(program)
    return AuditReport(name, sites, tuple(find(name, program, sites)))
