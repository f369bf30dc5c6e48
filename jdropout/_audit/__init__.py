"""An audit of what dropout really does in a function.

`audit` has the function traced (`program`): `jdropout._record` records the calls that Python makes,
`dataflow` finds them in the jaxpr and says where their keys come from, by `numbering` its values;
`places` and `masks` follow the masks of other libraries to what they drop. A `report` holds the sites
(`describe`) and what `findings` has against them.
"""

import functools
from collections.abc import Callable
from typing import Any

from jdropout._audit.report import Report


def audit(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """Traces a function and reports every dropout in it, and what is wrong with them.

    Nothing is run: the function is traced as by `jax.jit`, with all that it calls, whether it was
    compiled before or not. A site is a call of this library that drops, or a mask of
    `jax.random.bernoulli` that zeroes something, as in the dropout of Flax, Equinox and Haiku. A
    site in a loop counts once, and so does what a backward pass makes again. Of other libraries
    only masks are seen, so a rate of 0 is not.

    The findings are:

    - ``key-reused``: two sites have one key, so that their masks are correlated or the same. Two
      branches of a conditional may share one, and so may parts of a larger mask (``start``);
    - ``same-mask``: two sites have the same mask, by keys that were made in different ways;
    - ``key-independent-of-step``: the key depends on no argument, or there is an argument such as
      ``step`` or ``state.step`` and the key does not depend on it; then every step has the same
      mask. A key that the function also advances and returns counts as new in each step, and a
      random stream of Flax only if its count is returned, or stays in a module;
    - ``key-independent-of-iteration``: all iterations of a loop have the same mask;
    - ``rate-zero``, ``rate-one``: nothing, or everything, is dropped in training;
    - ``on-in-evaluation``: dropout is on under a function with a name such as ``evaluate``,
      ``predict`` or ``test_step``, and not differentiated (unless the name has ``mc``,
      ``bayesian``, ``uncertainty`` or ``train``);
    - ``shared-over-devices``: in a ``shard_map`` the input differs between devices along some axis
      of the mesh, but the key does not, and there is no ``start``;
    - ``shared-over-batch``, ``shared-over-heads``: all examples, or all heads of an attention, have
      the same mask. The batch is the first axis, unless arguments such as ``batch_axis`` say
      otherwise, or that of a ``vmap``; in attention heads come next.

    Args:
      fn: a function of arrays, pytrees and Flax modules, such as a training step.
      *args: its arguments: arrays, `jax.ShapeDtypeStruct`, numbers and what else it takes. Small
        arrays of known values, such as keys and the step, let the audit compare keys by value.
        Integers are traced where that works: they may be steps or seeds. All else is static.
      **kwargs: its keyword arguments.

    Returns:
      A report, which prints as a table.

    Raises:
      TypeError: if ``fn`` is not callable.

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
      The findings are the mistakes of the table "What goes wrong with dropout" in the
      documentation.
    """
    if not callable(fn):
        raise TypeError(f"fn must be a function, got {type(fn).__name__}. Pass the step itself.")
    # Here, since importing jax.extend takes longer than importing all of this library.
    from jdropout._audit.describe import describe
    from jdropout._audit.findings import find
    from jdropout._audit.program import trace

    program = trace(fn, args, kwargs)
    named = fn.func if isinstance(fn, functools.partial) else fn
    name = getattr(named, "__name__", type(named).__name__)
    sites = describe(program)
    return Report(name, sites, tuple(find(name, program, sites)))
