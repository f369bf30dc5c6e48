"""What a check of determinism returns: findings, with the places that they are about."""

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

from jdropout._audit.report import allowed, names_of

BETWEEN = ("runs", "machines", "devices", "batch sizes", "settings")
"""What results can differ between, from the least change to the largest."""

FIXES = {
    "python-state": "pass whatever changes as an argument, and draw random numbers from a key.",
    "file-order": "sort the names: sorted(os.listdir(folder)), sorted(glob(pattern)).",
    "process-index": "use the same key in all processes, as JAX's arrays are global; to give each "
    "process its own data, pass the data as arguments.",
    "callback": "compute it in JAX, or before the step and pass it as an argument; an io_callback "
    "with effects needs ordered=True.",
    "stateful-random": "draw with jax.random from a key.",
    "opaque-kernel": "read the kernel's own documentation, run it twice and compare, and then "
    "allow this finding.",
    "scatter-order": "set XLA_FLAGS=--xla_gpu_exclude_nondeterministic_ops=true, or pass "
    "unique_indices=True if the indices are unique.",
    "autotuning": "set XLA_FLAGS=--xla_gpu_deterministic_ops=true, or share the choice of kernels "
    "with --xla_gpu_load_autotune_results_from=FILE.",
    "nccl": "set NCCL_ALGO to Tree, Ring, CollnetDirect, CollnetChain or ^NVLS in all processes.",
    "instruction-set": "set XLA_FLAGS=--xla_cpu_max_isa=AVX2, or whatever all machines have.",
    "axis-index-key": "draw one mask for the whole array: pass start and global_shape to this "
    "library's functions, or draw outside of the shard_map.",
    "rbg": 'use the default keys, jax.random.key(seed, impl="threefry2x32"); the masks of this '
    "library are the same with keys of every kind.",
    "rbg-vmap": 'use the default keys, jax.random.key(seed, impl="threefry2x32").',
    "sum-order": "compare with a tolerance, or keep the shapes, the devices and their number.",
    "matmul-precision": 'set jax.config.update("jax_default_matmul_precision", "highest"), or pass '
    "precision.",
    "unstable-sort": "sort with stable=True.",
    "approximate-top-k": "use jax.lax.top_k.",
    "x64": "give a dtype, such as jnp.float32, wherever an array or a random number is made.",
    "threefry": 'set jax.config.update("jax_threefry_partitionable", True), the default.',
}
"""What to do, for each code of a finding."""


@dataclasses.dataclass(frozen=True)
class DeterminismPlace:
    """Operations of one kind on one line of the program.

    Attributes:
      location: file and line, such as ``train.py:12``; empty if unknown.
      function: function with this line.
      path: names of the modules and scopes around it, joined by /.
      primitive: JAX's name of the operation.
      count: number of these operations in the program; one in a loop counts once.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jdropout.testing import check_determinism
      >>> def total(x, index):
      ...     return jnp.zeros(8).at[index].add(x)
      >>> report = check_determinism(total, jnp.ones(4), jnp.arange(4), platform="cuda")
      >>> report.findings[0].code, report.findings[0].places[0].primitive
      ('scatter-order', 'scatter-add')

    References:
      The section "What may differ" of the documentation.
    """

    location: str
    function: str
    path: str
    primitive: str
    count: int = 1

    def __str__(self) -> str:
        words = [self.location or "unknown place", self.primitive, f"in {self.function}"]
        words = words if self.function else words[:-1]
        words += [f"({self.path})"] if self.path else []
        words += [f"{self.count} times"] if self.count > 1 else []
        return "  ".join(words)


@dataclasses.dataclass(frozen=True)
class DeterminismFinding:
    """Something that is free to differ.

    Attributes:
      code: kind of finding, such as ``scatter-order``; `check_determinism` lists all of them.
      between: what it can differ between: ``runs``, ``machines``, ``devices``, ``batch sizes``
        or ``settings``.
      message: why it can differ.
      fix: what to do about it.
      places: where it is, as `DeterminismPlace`, in the order of the program.

    Example:
      >>> import jax.numpy as jnp
      >>> from jdropout.testing import check_determinism
      >>> (finding,) = check_determinism(jnp.sum, jnp.ones(8), platform="cuda").findings
      >>> finding.code, finding.between
      ('sum-order', ('devices', 'batch sizes'))

    References:
      The section "What may differ" of the documentation.
    """

    code: str
    between: tuple[str, ...]
    message: str
    fix: str
    places: tuple[DeterminismPlace, ...]


@dataclasses.dataclass(frozen=True)
class DeterminismReport:
    """Findings of `check_determinism`; ``str(report)`` says them in words.

    Attributes:
      name: name of the function.
      platform: ``cpu``, ``cuda`` or ``tpu``.
      findings: what is free to differ, as `DeterminismFinding`.
      fingerprint: 16 hexadecimal digits that stand for the traced program and its constants.
        Print it in every process and every run: the order of a ``set`` of strings, a host's name
        or a version of JAX that get into the program change it.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> from jdropout.testing import check_determinism
      >>> def layer(key, x):
      ...     return jdropout.dropout(key, x, 0.5)
      >>> report = check_determinism(layer, jax.random.key(0), jnp.ones((8, 16)), platform="cuda")
      >>> report.assert_clean()
      >>> print(report)
      determinism of layer on cuda: 0 findings

    References:
      The section "What may differ" of the documentation.
    """

    name: str
    platform: str
    findings: tuple[DeterminismFinding, ...]
    fingerprint: str

    def assert_clean(
        self,
        *,
        between: str | Iterable[str] = BETWEEN,
        allow: Iterable[str] | Mapping[str, str] = (),
    ) -> None:
        """Raises an `AssertionError` with the whole report if anything can differ.

        Args:
          between: what must make no difference, such as ``"runs"`` or ``["runs", "machines"]``.
          allow: codes of findings to accept, such as ``["sum-order"]``, or a mapping from codes
            to locations or paths where they are accepted, which may have wildcards:
            ``{"callback": "logging.py:*"}``.

        Raises:
          AssertionError: if there is a finding that is not accepted.
          ValueError: if `between` or `allow` has something that is not there to choose.
        """
        chosen = set(names_of("between", between))
        if not chosen or not chosen <= set(BETWEEN):
            raise ValueError(
                f"between must hold some of {BETWEEN}, got {tuple(sorted(chosen))}. Leave it out "
                "for all of them."
            )
        accepted = allowed(allow, FIXES)
        for finding in self.findings:
            pattern = accepted.get(finding.code)
            if not chosen & set(finding.between):
                continue
            if pattern is None or not all(_matches(place, pattern) for place in finding.places):
                raise AssertionError(str(self))

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as dictionaries, sequences, strings and numbers, ready for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        count = len(self.findings)
        lines = [
            f"determinism of {self.name} on {self.platform}: "
            f"{count} finding{'' if count == 1 else 's'}"
        ]
        for finding in self.findings:
            between = ", ".join(finding.between)
            lines += ["", f"{finding.code} (between {between}): {finding.message}"]
            lines += [f"  {place}" for place in finding.places[:_SHOWN]]
            more = len(finding.places) - _SHOWN
            lines += [f"  and {more} more places"] if more > 0 else []
            lines += [f"  fix: {finding.fix}"]
        return "\n".join(lines)


_SHOWN = 5
"""Places that the text of a report has for each finding; the report itself has all of them."""


def _matches(place: DeterminismPlace, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in (place.location, place.path))
