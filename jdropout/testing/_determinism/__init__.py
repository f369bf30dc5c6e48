"""Says what in a program, and around it, is free to differ.

`trace` lists the operations of a function. `rules` judges them one by one, given the settings that
`environment` has read; `compare` traces the function again under other conditions.
"""

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from jdropout._values import check_function, check_option, type_name
from jdropout.testing._determinism.report import (
    FIXES,
    DeterminismFinding,
    DeterminismPlace,
    DeterminismReport,
)

_PLATFORMS = ("cpu", "cuda", "tpu")


def check_determinism(
    fn: Callable[..., Any],
    *args: Any,
    platform: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> DeterminismReport:
    """Traces a function and reports what is free to differ between runs, machines and devices.

    Nothing is run or compiled, so a training on GPUs can be checked on a laptop. The function is
    traced three times: as it is; in another process and with folders listed in another order, as
    far as Python code can see that; and with ``jax_enable_x64`` switched over. If the first two
    differ, more traces tell why.

    The findings are, by the least change that makes a difference:

    - between runs: ``python-state`` (a clock, a counter or NumPy's generator gets into the
      program), ``callback``, ``stateful-random``, ``opaque-kernel`` (a foreign kernel), and on
      GPUs ``scatter-order`` (colliding updates), ``autotuning`` and ``nccl``, unless the
      environment rules them out;
    - between machines: ``process-index``, ``file-order`` (files as the folder has
      them), and on CPUs ``instruction-set``;
    - between kinds, numbers or arrangements of devices: ``axis-index-key`` (a key made from the
      device's index), ``rbg``, ``rbg-vmap``, ``sum-order``, ``matmul-precision``,
      ``unstable-sort``, ``approximate-top-k``;
    - between batch sizes: ``sum-order``, ``rbg-vmap``;
    - between settings of JAX: ``x64``, ``threefry`` (not partitionable).

    Args:
      fn: function of arrays, pytrees and Flax modules, such as a training step.
      *args: arguments of `fn`. Arrays, abstract or not, are traced; everything else is static.
      platform: ``cpu``, ``cuda`` or ``tpu``; None for JAX's default backend.
      environment: environment variables of the training, of which ``XLA_FLAGS``,
        ``LIBTPU_INIT_ARGS`` and ``NCCL_ALGO`` matter; None for those of this process.

    Returns:
      A `DeterminismReport`; ``report.assert_clean(between="runs")`` makes a test of it.

    Raises:
      TypeError: if `fn` is not callable, or an argument has the wrong type.
      ValueError: if there are no rules for the platform.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jdropout.testing import check_determinism
      >>> def embedding_gradient(table, tokens):
      ...     return jax.grad(lambda table: jnp.sin(table[tokens]).sum())(table)
      >>> table, tokens = jnp.ones((50, 8)), jnp.arange(6)
      >>> def codes(flags):
      ...     settings = {"XLA_FLAGS": flags}
      ...     report = check_determinism(
      ...         embedding_gradient, table, tokens, platform="cuda", environment=settings
      ...     )
      ...     return [finding.code for finding in report.findings if "runs" in finding.between]
      >>> codes("")
      ['scatter-order']
      >>> codes("--xla_gpu_exclude_nondeterministic_ops=true")
      []

    References:
      XLA, "Determinism (GPU)"; Megatron-LM, ``--deterministic-mode``.
    """
    # Imported here: jax.extend takes longer to import than the rest of this library.
    from jdropout.testing._determinism import compare, rules
    from jdropout.testing._determinism.environment import read
    from jdropout.testing._determinism.trace import trace

    check_function("fn", fn)
    platform = _check_platform(platform)
    if environment is not None and not isinstance(environment, Mapping):
        raise TypeError(
            f"environment must be a mapping of variables, got {type_name(environment)}. Pass "
            'os.environ, or a dictionary such as {"XLA_FLAGS": "..."}.'
        )
    if environment is not None and not all(isinstance(x, str) for x in environment):
        raise TypeError(
            f"environment must have names of variables as keys, got {environment!r}. Pass "
            "{'XLA_FLAGS': '...'}."
        )
    settings = read(os.environ if environment is None else environment)
    again = functools.partial(trace, fn, args)
    program = again()
    found: list[tuple[Any, Any]] = list(compare.differences(program, again))
    found += compare.other_precision(program, again)
    for operation in program.operations:
        for complaint in rules.complaints(operation, platform, settings, _is_sharded(args)):
            found.append((complaint, operation))
    named = fn.func if isinstance(fn, functools.partial) else fn
    name = getattr(named, "__name__", type(named).__name__)
    return DeterminismReport(name, platform, _group(found), compare.fingerprint(program))


def _group(found: Iterable[tuple[Any, Any]]) -> tuple[DeterminismFinding, ...]:
    """One finding for everything that is said about several places."""
    places: dict[Any, dict[DeterminismPlace, int]] = {}
    for complaint, operation in found:
        counts = places.setdefault(complaint, {})
        if operation is not None:
            source = operation.source
            place = DeterminismPlace(source.location, source.function, source.path, operation.name)
            counts[place] = counts.get(place, 0) + 1
    order = list(FIXES)
    return tuple(
        DeterminismFinding(
            complaint.code,
            complaint.between,
            complaint.message,
            FIXES[complaint.code],
            tuple(
                DeterminismPlace(p.location, p.function, p.path, p.primitive, count)
                for p, count in counts.items()
            ),
        )
        for complaint, counts in sorted(places.items(), key=lambda item: order.index(item[0].code))
    )


def _is_sharded(args: Any) -> bool:
    """Whether an argument is split over devices, so that the partitioner splits sums."""
    shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(args))
    return any(
        isinstance(sharding, jax.sharding.Sharding) and not sharding.is_fully_replicated
        for sharding in shardings
    )


def _check_platform(platform: Any) -> str:
    if platform is None:
        platform = jax.default_backend()
    if isinstance(platform, str) and platform == "gpu":
        platform = "cuda"
    check_option("platform", platform, _PLATFORMS)
    return str(platform)
