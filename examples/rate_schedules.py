"""Trains the network of `train_mlp` with a drop rate that depends on the step.

The script compares no dropout and constant dropout with early dropout (a rate that falls to 0),
late dropout (0 up to a step) and curriculum dropout (a rate that rises from 0). All runs share
samples, initial parameters and batches; in each step the higher of two rates drops everything that
the lower one drops, and more.

    python examples/rate_schedules.py
    python examples/rate_schedules.py --width 6 --rate 0.1 --train-size 1000 --label-noise 0

The first network memorises wrong labels; the second one is so small that it has not even learnt all
of the right ones by the end. All randomness derives from one key and the step number, and the same
command on the same machine ends with the same digest.
"""

import argparse

import _digits
import jax
import jax.numpy as jnp
import numpy as np
import optax
import train_mlp
from _options import checked, parse_and_make_output

from jdropout import schedules


def main() -> None:
    options = parse_options()
    by_name = make_schedules(options)
    trainings = {name: make_training(options, schedule) for name, schedule in by_name.items()}
    histories, params = train_mlp.train_each(options, trainings)
    steps = train_mlp.evaluation_steps(options.steps)
    title = train_mlp.describe(options, f", cutoff at {options.cutoff_step}")
    _digits.print_results(histories, steps, title)
    path = options.output / "rate_schedules.png"
    _digits.save_curves(path, histories, steps, title, rates(by_name, options.steps))
    print(f"rates and learning curves: {path}")
    print(f"digest: {train_mlp.digest(params)}")


def make_schedules(options: argparse.Namespace) -> dict[str, schedules.Schedule]:
    rate = options.rate
    return {
        "no dropout": schedules.constant(0.0),
        "constant": schedules.constant(rate),
        "early": schedules.early(rate, options.cutoff_step),
        "late": schedules.late(rate, options.cutoff_step),
        "curriculum": schedules.curriculum(rate, gamma=10 / options.steps),
    }


def make_training(options: argparse.Namespace, schedule: schedules.Schedule) -> train_mlp.Training:
    def network_at(step: jax.Array) -> train_mlp.Network:
        # An nnx module has a static rate; with nnx, call jdropout.dropout in the model instead.
        return train_mlp.linen_network(options.width, schedule(step))

    return train_mlp.Training(network_at, optax.adam(options.learning_rate), options.batch_size)


def rates(by_name: dict[str, schedules.Schedule], steps: int) -> dict[str, np.ndarray]:
    """Returns the rates at all steps."""
    return {name: np.asarray(jax.vmap(f)(jnp.arange(steps))) for name, f in by_name.items()}


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Trains a network on handwritten digits with schedules of the dropout rate.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    step = checked(int, lambda n: 1 <= n <= 2**31 - 128, "a whole number from 1 to 2**31 - 128")
    train_mlp.add_training_options(parser.add_argument)
    train_mlp.add_comparison_options(parser.add_argument)
    parser.add_argument(
        "--cutoff-step", type=step, default=1000, help="where early dropout ends and late begins"
    )
    return parse_and_make_output(parser)


if __name__ == "__main__":
    main()
