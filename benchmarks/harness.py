"""Timing in interleaved rounds, and the ratios that come out of it."""

import random
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np


class Plan(NamedTuple):
    """How much to measure."""

    rounds: int
    few_rounds: int
    """Rounds of what takes long."""
    sample_seconds: float
    """A sample repeats its call until it lasts this long."""
    layers: int
    """Depth of the network that is compiled."""
    max_size: float
    """Larger arrays are not timed."""
    attention_length: int
    """Queries and keys of an attention."""
    lengths: tuple[int, ...]
    """Of attention that is timed."""
    compiled_lengths: tuple[int, ...]
    """Of attention that is compiled and not run."""
    block_sizes: tuple[int, ...]
    """Queries or keys in a block of attention."""
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
"""A call as long as this is timed without one before it."""


class Ratio(NamedTuple):
    """Median and quartiles over the rounds."""

    median: float
    lower: float
    upper: float

    def __str__(self) -> str:
        decimals = 2 if self.median < 10 else 1 if self.median < 100 else 0
        return f"{self.median:.{decimals}f} ± {(self.upper - self.lower) / 2:.{decimals}f}"


class Row(NamedTuple):
    """A row of a table; the details, such as absolute times, are for the JSON file only."""

    labels: dict[str, str]
    cells: dict[str, Ratio | str]
    details: dict[str, Any]


def timed_row(
    labels: dict[str, str],
    functions: Mapping[str, Callable[[], Any]],
    columns: tuple[str, ...],
    plan: Plan,
) -> Row:
    """Times competitors against each other.

    Args:
      labels: what the row is about.
      functions: the competitors by name; each returns JAX arrays.
      columns: the wanted ratios, such as ``"ours / copy"``.
      plan: number of rounds, and length of a sample.

    Returns:
      The row of ratios; its details are the median times of one call.
    """
    return ratio_row(labels, time_all(functions, plan), columns)


def time_all(functions: Mapping[str, Callable[[], Any]], plan: Plan) -> dict[str, np.ndarray]:
    """Seconds of a call, for every competitor and round."""
    samplers = {name: sampler(function, plan) for name, function in functions.items()}
    return interleave(samplers, plan.rounds)


def interleave(samplers: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, np.ndarray]:
    """Takes one sample of every competitor per round, in an order drawn anew for each round.

    What slows the machine down for a while then falls on all alike, and none has a favourite
    predecessor.
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


def sampler(function: Callable[[], Any], plan: Plan) -> Callable[[], float]:
    """Returns what measures the mean time of a call, in seconds."""
    # Calls queued on a CPU may run side by side; on an accelerator it is the wait that costs.
    wait_for_each = jax.default_backend() == "cpu"

    def sample(calls: int, warm_up: bool = True) -> float:
        # The first call pays for what its predecessor left behind: on a busy machine, 4096 x 4096,
        # the quartiles of ours / copy were 0.85 and 1.39 in first calls, 1.08 and 1.16 in second.
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
    return lambda: sample(calls, warm_up=seconds < LONG_SECONDS)
