"""Names the line of a difference that an assertion found, by recording both runs."""

from collections.abc import Callable
from typing import Any

from jdropout.testing._first_difference import first_difference
from jdropout.testing._recording import MAX_ITERATIONS, Recorder, Recording, about

MOST_EQUATIONS = 3000
"""Of larger programs a recording would take minutes to compile."""


def explain(one: Callable[[], Recording], other: Callable[[], Recording]) -> str:
    """Describes the first difference of two recordings, or why there is none."""
    try:
        found = first_difference(one(), other())
    except _TooLargeError as error:
        return (
            f"\nIts program has {error.args[0]} equations, too many to record it here: "
            "record_training finds the step and the line."
        )
    except Exception as error:  # such as float(loss) in a training, which cannot be traced
        return (
            f"\nThe line is unknown, since the function cannot be traced as a whole "
            f"({type(error).__name__}): record_training of its step finds it."
        )
    if found is None:
        return (
            "\nRecorded twice it does not differ: the difference is between runs, or it needs the "
            "plain program, without the fingerprints."
        )
    return f"\nRecorded, it first differs here:\n{found}"


def record_small(fn: Callable[..., Any], *args: Any) -> Recording:
    """`record`, if the program is not large."""
    from jdropout.testing import _tracing

    traced = _tracing.trace(fn, args, MAX_ITERATIONS)
    if traced.program.equations > MOST_EQUATIONS:
        raise _TooLargeError(traced.program.equations)
    _, fingerprints, values = Recorder(traced, values=True)(traced.leaves)
    return Recording(traced.program, fingerprints, about(), [values])


class _TooLargeError(Exception):
    pass
