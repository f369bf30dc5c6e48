"""Proves that transformer.py is the transformer of examples/train_transformer.py.

It carries the weights over, and compares masks, values, gradients and a training, in this order.
Then it does the same with what must fail: other keys, no dropout, and errors planted in the port.

    pip install -e '.[test,ports]'
    python ports/torch/prove_transformer.py
    python ports/torch/prove_transformer.py --no-controls --width 128 --context 64 --batch-size 16
"""

import argparse
import contextlib
import functools
import math
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import named_values
import numpy as np
import optax
import torch
import transformer
from flax import nnx
from named_values import first_difference, record_nnx, record_torch
from torch import nn
from transformer import (
    Block,
    Transformer,
    calls,
    dropout_key,
    flax_value,
    load_flax,
    train_step,
)

sys.path.append(str(pathlib.Path(__file__).parents[2] / "examples"))
import train_transformer as example

import jdropout.nnx

torch.set_num_threads(1)  # arrays are small, and on a busy machine threads wait for each other

OTHER_ROOT = (0, 1)

LIMIT = 1e-4
"""How far a loss of the training may be off, relative to itself."""

TOLERANCE = 1e-12
"""How far a value or a gradient in float64 may be off, relative to its largest element."""


def main() -> None:
    case = Case(parse_options())
    print(f"{len(case.flat(case.params))} arrays of weights; {case.options}")
    print_masks(case)
    values, gradients, loss = compare_float64(case)
    print(f"\nfloat64, step 1: values off by {values:.1e}, gradients by {gradients:.1e}, ", end="")
    print(f"the loss by {loss:.1e}")
    print(f"float64, 3 steps: updates off by {compare_updates(case):.1e}, ", end="")
    with optax_rates():
        print(f"by {compare_updates(case):.1e} with Optax's learning rates in float32")
    losses, _ = train_example(case)
    print(f"\n{case.options.steps} steps in float32, loss {losses[0]:.4f} to {losses[-1]:.4f}")
    print(f"{'port':58}largest deviation  at step  first above {LIMIT:g}")
    print_losses("as it is", losses, train_port(case))
    if case.options.controls:
        print_controls(case, losses)
        print_planted(case)


# --- both sides ---------------------------------------------------------------------------


class Case:
    """The example's model, its weights and its batches, and our key."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        init_key, train_key = jax.random.split(jax.random.key(options.seed))
        self.root = tuple(jax.random.key_data(train_key).tolist())
        model = example.Transformer(options, options.rate, nnx.Rngs(init_key))
        self.structure, self.params = nnx.split(model)
        text = jnp.asarray(example.load_text(options.train_chars).train)

        @jax.jit
        def draw(step: jax.Array) -> tuple[jax.Array, jax.Array]:
            batch_key, dropout_key = jax.random.split(jax.random.fold_in(train_key, step))
            length = options.context + 1
            return example.draw_windows(batch_key, text, options.batch_size, length), dropout_key

        self.batches, self.keys = zip(*map(draw, range(options.steps)), strict=True)

    def flat(self, tree: nnx.State) -> dict[str, np.ndarray]:
        """A state, such as parameters or gradients, with a name for each array."""
        leaves = nnx.to_flat_state(tree)
        return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in leaves}

    def port(self, dtype: torch.dtype = torch.float32) -> Transformer:
        o = self.options
        sizes = (len(example.VOCABULARY), o.context, o.width, o.layers, o.heads, o.rate)
        model = Transformer(*sizes)
        load_flax(model, self.flat(self.params))
        return model.to(dtype)

    def windows(self, step: int) -> torch.Tensor:
        return torch.tensor(np.asarray(self.batches[step]), dtype=torch.int64)


# --- masks --------------------------------------------------------------------------------


def masks_of_example(case: Case, step: int) -> list[np.ndarray]:
    """The masks that the example's layers apply: each layer is given ones as well."""
    masks = []
    attention, layer = jdropout.nnx.dot_product_attention, jdropout.nnx.Dropout.__call__

    def recorded_layer(self: Any, x: Any, *, deterministic: Any, rngs: Any) -> Any:
        key = rngs.dropout()
        masks.append(np.asarray(layer(self, jnp.ones_like(x), rngs=key, deterministic=False) != 0))
        return layer(self, x, rngs=key, deterministic=deterministic)

    def recorded_attention(query: Any, key: Any, value: Any, **options: Any) -> Any:
        # Equal logits, and values that tell which key they are of: the output is the weights.
        ones = jnp.eye(key.shape[1])[:, None] * jnp.ones_like(value[..., :1])
        weights = attention(query * 0, key * 0, ones, **{**options, "mask": None})
        masks.append(np.moveaxis(np.asarray(weights) != 0, -2, -3))
        return attention(query, key, value, **options)

    model = nnx.merge(case.structure, case.params)
    for block in model.blocks:
        block.attention.attention_fn = recorded_attention
    with mock.patch.object(jdropout.nnx.Dropout, "__call__", recorded_layer):
        model(case.batches[step][:, :-1], case.keys[step])
    return masks


def masks_of_port(case: Case, step: int) -> list[np.ndarray]:
    masks = []

    def recorded(key: Any, x: torch.Tensor, rate: float) -> torch.Tensor:
        masks.append(original(key, torch.ones_like(x), rate).numpy() != 0)
        return original(key, x, rate)

    original = transformer.dropout
    with mock.patch.object(transformer, "dropout", recorded), torch.no_grad():
        case.port()(case.windows(step)[:, :-1], calls(dropout_key(case.root, step)))
    return masks


def print_masks(case: Case) -> None:
    for step in (0, case.options.steps - 1):
        theirs, ours = masks_of_example(case, step), masks_of_port(case, step)
        same = sum(np.array_equal(a, b) for a, b in zip(theirs, ours, strict=True))
        bits = sum(mask.size for mask in theirs)
        print(f"masks of step {step}: {same} of {len(theirs)} are equal, of {bits} bits together")


# --- values and gradients -----------------------------------------------------------------


class Comparison(NamedTuple):
    """Largest deviations."""

    values: float
    """Relative to the largest element of the value."""
    gradients: float
    """Relative to the largest element of all: a gradient may be zero but for rounding."""
    loss: float
    """Relative to itself."""


def compare_float64(case: Case, step: int = 1) -> Comparison:
    theirs, gradients, loss = example_in_float64(case, step)
    model, ours, our_loss = port_in_float64(case, step)
    names = theirs.keys() & ours.keys()
    values = max(named_values.deviation(theirs[name], ours[name]) for name in names)
    largest = max(np.abs(gradient).max() for gradient in gradients.values())
    off = [
        np.abs(flax_value(name, tuple(ours.shape), gradients) - ours.grad.numpy()).max()
        for name, ours in model.named_parameters()
    ]
    return Comparison(values, max(off) / largest, abs(our_loss - loss) / abs(loss))


def example_in_float64(case: Case, step: int) -> tuple[dict, dict, float]:
    """Values of all modules, gradients by the parameters' names, and the loss."""
    with jax.enable_x64(True):
        model, params = double(case)
        windows, key = case.batches[step], case.keys[step]
        loss_and_gradient = jax.jit(jax.value_and_grad(example.loss), static_argnums=1)
        loss, gradients = loss_and_gradient(params, nnx.graphdef(model), windows, key)
        with record_nnx(model) as values:
            model(windows[:, :-1], key)
        return values, case.flat(gradients), float(loss)


def double(case: Case) -> tuple[Any, nnx.State]:
    """The example's model and its parameters in float64."""
    params = jax.tree.map(lambda p: p.astype(jnp.float64), case.params)
    model = nnx.merge(case.structure, params)
    for embedding in (model.characters, model.positions):
        embedding.dtype = None  # Flax took float32 from the parameters that they had
    return model, params


def port_in_float64(case: Case, step: int) -> tuple[Transformer, dict, float]:
    model = case.port(torch.float64)
    with record_torch(model) as values:
        keys = calls(dropout_key(case.root, step))
        loss = transformer.loss_of(model, case.windows(step), keys)
    loss.backward()
    return model, values, loss.item()


def compare_updates(case: Case, steps: int = 3) -> float:
    """Largest deviation of a parameter after so many steps in float64, of the largest change."""
    with jax.enable_x64(True):
        model, params = double(case)
        before = case.flat(params)
        after = case.flat(train_example(case, steps, nnx.graphdef(model), params)[1])
    ours = case.port(torch.float64)
    train_port(case, last=steps, model=ours)
    off = [
        np.abs(flax_value(name, tuple(value.shape), after) - value.detach().numpy()).max()
        for name, value in ours.named_parameters()
    ]
    return max(off) / max(np.abs(after[name] - before[name]).max() for name in before)


# --- training -----------------------------------------------------------------------------


def train_example(
    case: Case,
    last: int | None = None,
    structure: nnx.GraphDef | None = None,
    params: nnx.State | None = None,
) -> tuple[list[float], nnx.State]:
    """Losses and last parameters of the example's own training, by default in float32."""
    structure, params = structure or case.structure, params or case.params
    optimizer = example.make_optimizer(case.options)

    @jax.jit
    def step(state: example.State, windows: jax.Array, key: jax.Array) -> Any:
        loss, gradient = jax.value_and_grad(example.loss)(state.params, structure, windows, key)
        return loss, example.update(optimizer, state, gradient)

    state, losses = example.State(params, optimizer.init(params)), []
    for windows, key in zip(case.batches[:last], case.keys[:last], strict=True):
        loss, state = step(state, windows, key)
        losses.append(float(loss))
    return losses, state.params


def train_port(
    case: Case,
    root: tuple[int, ...] | None = None,
    last: int | None = None,
    model: Transformer | None = None,
) -> list[float]:
    """Losses of the port's training, by default in float32; with other keys if a root is given."""
    model = case.port() if model is None else model
    optimizer = transformer.make_optimizer(model)
    options = {"steps": case.options.steps, "peak": case.options.learning_rate}
    return [
        train_step(
            model, optimizer, case.windows(step), root=root or case.root, step=step, **options
        )
        for step in range(case.options.steps if last is None else last)
    ]


def off_by(theirs: list[float], ours: list[float]) -> tuple[float, int]:
    """The largest deviation of a loss, relative to itself, and its step."""
    return max((abs(a - b) / abs(a), n) for n, (a, b) in enumerate(zip(theirs, ours, strict=False)))


def print_controls(case: Case, losses: list[float]) -> None:
    print_losses("another root key", losses, train_port(case, OTHER_ROOT))
    runs = {
        "torch.nn.functional.dropout, its own masks": own_masks,
        "no dropout": no_dropout,
        **PLANTED,
        **PLANTED_IN_TRAINING,
    }
    for name, planted in runs.items():
        with planted():
            print_losses(name, losses, train_port(case))


def print_losses(name: str, theirs: list[float], ours: list[float]) -> None:
    largest, step = off_by(theirs, ours)
    late = (n for n in range(len(ours)) if off_by(theirs[n:], ours[n : n + 1])[0] > LIMIT)
    print(f"{name:58}{largest:17.1e}{step:9d}{next(late, 'never'):>19}")


def optax_rates() -> contextlib.AbstractContextManager:
    """The port trains with the learning rates that Optax computes, in float32."""

    def rate(step: int, steps: int, peak: float) -> float:
        schedule = optax.warmup_cosine_decay_schedule(0.0, peak, steps // 10, steps)
        return float(jax.jit(schedule)(step))

    return mock.patch.object(transformer, "learning_rate", rate)


# --- controls -----------------------------------------------------------------------------


def own_masks() -> contextlib.AbstractContextManager:
    torch.manual_seed(0)
    return mock.patch.object(
        transformer, "dropout", lambda key, x, rate: nn.functional.dropout(x, rate)
    )


def no_dropout() -> contextlib.AbstractContextManager:
    return mock.patch.object(transformer, "dropout", lambda key, x, rate: x)


# --- planted errors -----------------------------------------------------------------------


def changed(kind: type, change: Callable[[Any], None]) -> contextlib.AbstractContextManager:
    """Models that are made in the context have a changed module."""
    original = kind.__init__

    @functools.wraps(original)
    def init(self: Any, *args: Any) -> None:
        original(self, *args)
        change(self)

    return mock.patch.object(kind, "__init__", init)


def epsilon() -> contextlib.AbstractContextManager:
    def change(block: Block) -> None:
        block.hidden_norm.eps = 1e-5

    return changed(Block, change)


def scale() -> contextlib.AbstractContextManager:
    def change(block: Block) -> None:
        block.attention.scale = 1 / math.sqrt(block.attention.query.in_features)

    return changed(Block, change)


def exact_gelu() -> contextlib.AbstractContextManager:
    def change(block: Block) -> None:
        block.gelu = nn.GELU()

    return changed(Block, change)


def transposed() -> contextlib.AbstractContextManager:
    original = transformer.flax_value

    def value(name: str, *arguments: Any) -> np.ndarray:
        found = original(name, *arguments)
        return found.T if name.endswith("attention.out.weight") else found

    return mock.patch.object(transformer, "flax_value", value)


def after_residual() -> contextlib.AbstractContextManager:
    def forward(self: Block, x: torch.Tensor, keys: Any) -> torch.Tensor:
        x = self.dropout(x + self.attention(self.attention_norm(x), keys), keys)
        hidden = self.dropout(self.gelu(self.hidden(self.hidden_norm(x))), keys)
        return x + self.dropout(self.output(hidden), keys)

    return mock.patch.object(Block, "forward", forward)


def after_next_call() -> contextlib.AbstractContextManager:
    """The keys of two dropouts are exchanged: the order of calls is part of the port."""

    def forward(self: Block, x: torch.Tensor, keys: Any) -> torch.Tensor:
        first, second, *rest = (next(keys) for _ in range(4))
        keys = iter([second, first, *rest])
        return original(self, x, keys)

    original = Block.forward
    return mock.patch.object(Block, "forward", forward)


def nominal_scale() -> contextlib.AbstractContextManager:
    """Kept values are divided by 1 - rate, not by the probability that the mask has."""
    original = transformer.dropout

    def dropout(key: Any, x: torch.Tensor, rate: float) -> torch.Tensor:
        mask = original(key, torch.ones_like(x), rate) != 0
        return torch.where(mask, x / (1 - rate), 0)

    return mock.patch.object(transformer, "dropout", dropout)


PLANTED: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
    "LayerNorm with PyTorch's epsilon of 1e-5": epsilon,
    "attention scaled by the width, not that of a head": scale,
    "exact GELU, PyTorch's default": exact_gelu,
    "a square weight that is not transposed": transposed,
    "dropout after the residual": after_residual,
    "keys in another order": after_next_call,
    "scale of the nominal rate, 1 / (1 - rate)": nominal_scale,
}


def decay() -> contextlib.AbstractContextManager:
    return mock.patch.object(
        transformer, "make_optimizer", lambda model: torch.optim.AdamW(model.parameters())
    )


def adams_epsilon() -> contextlib.AbstractContextManager:
    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), eps=1e-6, weight_decay=1e-4)

    return mock.patch.object(transformer, "make_optimizer", optimizer)


def late_schedule() -> contextlib.AbstractContextManager:
    original = transformer.learning_rate
    return mock.patch.object(
        transformer, "learning_rate", lambda step, *options: original(step + 1, *options)
    )


PLANTED_IN_TRAINING: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
    "AdamW with PyTorch's weight decay of 1e-2": decay,
    "AdamW with an epsilon of 1e-6, not 1e-8": adams_epsilon,
    "a schedule that is one step ahead": late_schedule,
}


def locate(case: Case, theirs: dict[str, np.ndarray], step: int = 1) -> Any:
    """The first value of a module that differs, if any."""
    return first_difference(theirs, port_in_float64(case, step)[1], TOLERANCE)


def print_planted(case: Case) -> None:
    theirs, _, _ = example_in_float64(case, 1)
    print("\nwhere the first difference is")
    for name, planted in {"as it is": contextlib.nullcontext, **PLANTED}.items():
        with planted():
            print(f"{name:58}{locate(case, theirs)}")
    print("\nupdates of 3 steps in float64 are off by")
    for name, planted in {"as it is": contextlib.nullcontext, **PLANTED_IN_TRAINING}.items():
        with planted():
            print(f"{name:58}{compare_updates(case):.1e}")


# --- options ------------------------------------------------------------------------------


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Compares the example's training with its port to PyTorch.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for name, value in vars(small()).items():
        if name != "attention":
            kind = type(value)
            parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=value, help=" ")
    parser.add_argument(
        "--controls", action=argparse.BooleanOptionalAction, default=True, help="what must fail"
    )
    return argparse.Namespace(**vars(parser.parse_args()), attention="jdropout")


def small() -> argparse.Namespace:
    """Sizes at which a training takes seconds."""
    return argparse.Namespace(
        attention="jdropout",
        rate=0.1,
        layers=2,
        heads=4,
        width=32,
        context=32,
        batch_size=8,
        steps=100,
        learning_rate=3e-3,
        seed=0,
        train_chars=20000,
    )


if __name__ == "__main__":
    main()
