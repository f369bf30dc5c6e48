"""Records the fingerprint of every value that a program computes."""

import os
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import numpy as np

from jdropout._values import check_flag, check_function, check_positive
from jdropout.testing import _files
from jdropout.testing._program import Program

MAX_ITERATIONS = 256


class Recording:
    """Fingerprints of all values of a program, from `record` or `record_training`.

    Two recordings are equal if they have the same program and the same fingerprints;
    `first_difference` says where they differ. A file of a recording has the same content wherever
    it is written: the words for the equations, and 8 bytes for every value.

    Example:
      >>> import pathlib, tempfile
      >>> import jax.numpy as jnp
      >>> from jdropout.testing import Recording, record
      >>> recording = record(jnp.sin, jnp.ones(3))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder) / "sin.rec"
      ...     recording.save(path)
      ...     Recording.load(path) == recording
      True

    References:
      RFC 8259, "The JavaScript object notation (JSON) data interchange format", for the files,
      which are compressed by gzip.
    """

    def __init__(
        self,
        program: Program,
        fingerprints: np.ndarray,
        about: dict[str, Any],
        values: list[list[np.ndarray]],
    ):
        """Made by `record`, `record_training` and `load`."""
        self._program = program
        self._fingerprints = fingerprints
        """64 bits per value: of the program, or, with an axis of steps, of state and program."""
        self._about = about
        self._values = values
        """The values of each recorded step; empty if they were not kept."""

    @property
    def equations(self) -> int:
        """Number of equations in the program; one in a loop counts once."""
        return self._program.equations

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps of a training whose equations were recorded; empty without a training."""
        if "every" not in self._about:
            return ()
        return tuple(range(0, self._about["steps"], self._about["every"]))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the recording to a file that any machine can read, without the values.

        Args:
          path: name of the file, such as ``"run.rec"``. A file that is there is replaced.

        Raises:
          OSError: if the file cannot be written.
        """
        _files.write(path, self._program, self._fingerprints, self._about)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Recording":
        """Reads a file that `save` wrote.

        Args:
          path: name of the file.

        Returns:
          The recording, without values.

        Raises:
          OSError: if the file cannot be read.
          ValueError: if it is not a recording, or has a version that is unknown here.
        """
        return cls(*_files.read(path), values=[])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Recording):
            return NotImplemented
        same = self._program == other._program and self._about == other._about
        return same and np.array_equal(self._fingerprints, other._fingerprints)

    __hash__: ClassVar[None] = None  # type: ignore[assignment]  # arrays are compared, which have no hash

    def __repr__(self) -> str:
        steps = f"{len(self.steps)} of {self._about['steps']} steps, " if self.steps else ""
        return (
            f"Recording({steps}{self.equations} equations, "
            f"JAX {self._about['jax']} on {self._about['device']})"
        )


def record(
    fn: Callable[..., Any],
    *args: Any,
    values: bool = False,
    max_iterations: int = MAX_ITERATIONS,
) -> Recording:
    """Runs a function and keeps a fingerprint of every value that it computes.

    The function is traced as by `jax.jit`, and its program is run once, compiled, with 64 bits
    taken of the bits of every output of every equation, in every iteration of every loop and on
    every device of a `jax.shard_map`. Functions that are jitted, rematerialised or have custom
    derivatives are looked into; a Pallas kernel or a linear solve counts as one equation. The
    fingerprints do not depend on how arrays are sharded.

    Taking fingerprints can change which operations XLA fuses, and with that the rounding of
    floating-point numbers: compare recordings with recordings, not with the plain program. A
    difference that needs the plain program's fusions may vanish in a recording.

    Args:
      fn: function of arrays, pytrees and Flax modules, such as a training step. State of Flax nnx
        modules that it changes is a result, and the modules keep theirs.
      *args: arguments of `fn`. Arrays are traced; everything else, numbers too, is static.
      values: if True, keep the values themselves in memory, so that `first_difference` can say
        which elements differ, and by how much. They are not saved to files.
      max_iterations: iterations of a while loop with fingerprints of their own. All further ones
        share one: a difference there is found, but not in which iteration.

    Returns:
      A `Recording`, to save or to compare with `first_difference`.

    Raises:
      TypeError: if `fn` is not callable, or another argument has the wrong type.
      ValueError: if `max_iterations` is less than 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jdropout.testing import first_difference, record
      >>> def loss(w, x):
      ...     return jnp.tanh(x @ w).sum()
      >>> one, other = (record(jax.grad(loss), jnp.ones(3), jnp.full(3, x)) for x in (1.0, 2.0))
      >>> print(first_difference(one, one))
      None
      >>> first_difference(one, other).name
      'argument x'

    References:
      Chris Wellons, "hash-prospector", for the mix of 32 bits.
    """
    from jdropout.testing import _tracing  # which takes long to import

    check_function("fn", fn)
    check_flag("values", values)
    _tracing.check_leaves("args", args)
    traced = _tracing.trace(fn, args, check_positive("max_iterations", max_iterations))
    _, fingerprints, kept = Recorder(traced, values)(traced.leaves)
    return Recording(traced.program, fingerprints, about(), [kept] if values else [])


class Recorder:
    """A traced program, compiled to take fingerprints."""

    def __init__(self, traced: Any, values: bool, tap: Any = None):
        from jdropout.testing import _probes

        self._constants = traced.closed.consts
        self._run = jax.jit(_probes.probe(traced.closed, traced.program, values, tap))

    def __call__(self, leaves: Sequence[Any]) -> tuple[list[Any], np.ndarray, list[np.ndarray]]:
        """Returns the outputs, the fingerprints and the values, the latter two on the host."""
        outputs, rows, values = self._run(True, self._constants, leaves)
        return outputs, as_64_bits(rows), [np.asarray(x) for x in values]


def as_64_bits(rows: jax.Array) -> np.ndarray:
    low, high = np.asarray(rows).astype(np.uint64).T
    return low | high << np.uint64(32)


def about(**more: Any) -> dict[str, Any]:
    return {"jax": jax.__version__, "device": jax.devices()[0].platform, **more}
