"""Timing in interleaved rounds, and ratios of the times."""

import random
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np


class Plan(NamedTuple):
    """Size of the measurement."""

    rounds: int
    few_rounds: int
    """Rounds for slow sections."""
    sample_seconds: float
    """A sample repeats its call until it takes this long, in seconds."""
    layers: int
    """Depth of the network whose compilation is timed."""
    max_size: float
    """Larger arrays are not timed."""
    attention_length: int
    """Number of queries and keys of an attention."""
    lengths: tuple[int, ...]
    """Lengths of attention that are timed."""
    compiled_lengths: tuple[int, ...]
    """Lengths of attention that are compiled but not run."""
    block_sizes: tuple[int, ...]
    """Number of queries or keys per block of attention."""
    transformer_blocks: int


FULL = Plan(
    rounds=15,
    few_rounds=5,
    sample_seconds=0.02,
    layers=48,
    max_size=float("inf"),
    attention_length=2048,
    lengths=(1024, 2048, 4096, 8192, 16384),
    compiled_lengths=(1024, 2048, 4096, 8192, 16384),
    block_sizes=(128, 256, 512),
    transformer_blocks=4,
)
QUICK = Plan(
    rounds=3,
    few_rounds=2,
    sample_seconds=0.005,
    layers=6,
    max_size=2**20,
    attention_length=256,
    lengths=(256, 512),
    compiled_lengths=(1024, 2048),
    block_sizes=(64, 128),
    transformer_blocks=1,
)
LONG_SECONDS = 0.5
"""Calls that take this long, in seconds, are timed without an untimed call first."""


class Ratio(NamedTuple):
    """Median and quartiles over the rounds."""

    median: float
    lower: float
    upper: float

    def __str__(self) -> str:
        decimals = 2 if self.median < 10 else 1 if self.median < 100 else 0
        return f"{self.median:.{decimals}f} ± {(self.upper - self.lower) / 2:.{decimals}f}"


class Row(NamedTuple):
    """A row of a table; details, such as absolute times, only go into the JSON file."""

    labels: dict[str, str]
    cells: dict[str, Ratio | str]
    details: dict[str, Any]


def timed_row(
    labels: dict[str, str],
    functions: Mapping[str, Callable[[], Any]],
    columns: tuple[str, ...],
    plan: Plan,
    always_warm: bool = False,
) -> Row:
    """Times competitors against each other.

    Args:
      labels: description of the row.
      functions: competitors by name; each returns JAX arrays.
      columns: ratios to compute, such as ``"ours / copy"``.
      plan: number of rounds, and length of a sample.
      always_warm: whether long calls too are timed after an untimed one: where competitors
        allocate different amounts, the larger one pays for pages that the smaller one gave back.

    Returns:
      The row of ratios; its details are the median times of one call.
    """
    return ratio_row(labels, time_all(functions, plan, always_warm), columns)


def time_all(
    functions: Mapping[str, Callable[[], Any]], plan: Plan, always_warm: bool = False
) -> dict[str, np.ndarray]:
    """Returns the seconds per call, for every competitor and round."""
    samplers = {name: sampler(function, plan, always_warm) for name, function in functions.items()}
    return interleave(samplers, plan.rounds)


def interleave(samplers: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, np.ndarray]:
    """Takes one sample of every competitor per round, in a new random order each time.

    A temporary slowdown of the machine then affects all of them equally, and no competitor always
    runs after the same one.
    """
    samples: dict[str, list[Any]] = {name: [] for name in samplers}
    generator = random.Random(0)
    for _ in range(rounds):
        for name in generator.sample(list(samplers), len(samplers)):
            samples[name].append(samplers[name]())
    return {name: np.array(values) for name, values in samples.items()}


def ratio_row(
    labels: dict[str, str], times: Mapping[str, np.ndarray], columns: tuple[str, ...]
) -> Row:
    """Divides round by round; takes medians and quartiles last. A missing competitor gives "-"."""
    cells: dict[str, Ratio | str] = dict.fromkeys(columns, "-")
    for column in columns:
        over, under = column.split(" / ")
        if over in times and under in times:
            lower, median, upper = np.quantile(times[over] / times[under], [0.25, 0.5, 0.75])
            cells[column] = Ratio(float(median), float(lower), float(upper))
    seconds = {name: float(np.median(samples)) for name, samples in times.items()}
    return Row(labels, cells, {"seconds": seconds})


def sampler(
    function: Callable[[], Any], plan: Plan, always_warm: bool = False
) -> Callable[[], float]:
    """Returns a function that measures the mean time of a call, in seconds."""
    # Queued calls may run concurrently on a CPU; on an accelerator, waiting is what costs time.
    wait_for_each = jax.default_backend() == "cpu"

    def sample(calls: int, warm_up: bool = True) -> float:
        # The first call pays for the state its predecessor left behind: on a busy machine, at
        # 4096 x 4096, the quartiles of ours / copy were 0.85 and 1.39 in first calls, 1.08 and 1.16
        # in second calls.
        if warm_up:
            jax.block_until_ready(function())
        start = time.perf_counter()
        for _ in range(calls):
            result = function()
            if wait_for_each:
                jax.block_until_ready(result)
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / calls

    calls = 1
    while (seconds := calls * sample(calls)) < plan.sample_seconds:
        calls *= 2
    return lambda: sample(calls, warm_up=always_warm or seconds < LONG_SECONDS)
