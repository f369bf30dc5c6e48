"""The transformer of examples/train_transformer.py in PyTorch, with the same weights and masks.

    model = Transformer(vocabulary=96, context=64, width=128, layers=2, heads=4, rate=0.1)
    load_flax(model, dict(numpy.load("params.npz")))    # names such as blocks.0.hidden.kernel
    optimizer = make_optimizer(model)
    for step, windows in enumerate(batches):
        loss = train_step(model, optimizer, windows, root=(0, 42), step=step, steps=800, peak=3e-3)

Comments say where PyTorch's defaults are not those of Flax and Optax: each of these differences is
an error that leaves a port working, and slightly wrong.
"""

import itertools
import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from jdropout_torch import Key, dropout, fold_in
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

Keys = Iterator[Key] | None
"""A key for each dropout, in the order of their calls; None for evaluation."""


def calls(key: Key) -> Iterator[Key]:
    """The keys of ``nnx.Rngs(dropout=key)``: its call number n has the key fold_in(key, n)."""
    return (fold_in(key, number) for number in itertools.count())


# --- model --------------------------------------------------------------------------------


class Dropout(nn.Module):
    """`jdropout.nnx.Dropout`, a module so that its output has a name."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor, keys: Keys) -> Tensor:
        return x if keys is None else dropout(next(keys), x, self.rate)


class Attention(nn.Module):
    """`jdropout.nnx.MultiHeadAttention`, causal, with all of its probabilities at once."""

    def __init__(self, width: int, heads: int, rate: float):
        super().__init__()
        self.heads = heads
        self.scale = 1 / math.sqrt(width // heads)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.dropout = Dropout(rate)

    def forward(self, x: Tensor, keys: Keys) -> Tensor:
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        logits = query @ key.mT * self.scale
        later = torch.ones(logits.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        # The mask's shape is part of the law: (batch, heads, queries, keys).
        weights = self.dropout(logits.masked_fill(later, -math.inf).softmax(-1), keys)
        return self.out((weights @ value).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and an MLP, each on a residual branch that ends in dropout."""

    def __init__(self, width: int, heads: int, rate: float):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=1e-6)  # Flax's; PyTorch's is 1e-5
        self.attention = Attention(width, heads, rate)
        self.hidden_norm = nn.LayerNorm(width, eps=1e-6)
        self.hidden = nn.Linear(width, 4 * width)
        self.gelu = nn.GELU(approximate="tanh")  # Flax's; PyTorch's is exact
        self.output = nn.Linear(4 * width, width)
        self.dropout = Dropout(rate)

    def forward(self, x: Tensor, keys: Keys) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), keys), keys)
        hidden = self.dropout(self.gelu(self.hidden(self.hidden_norm(x))), keys)
        return x + self.dropout(self.output(hidden), keys)


class Transformer(nn.Module):
    """A decoder: embeddings with dropout, blocks, and logits."""

    def __init__(
        self, vocabulary: int, context: int, width: int, layers: int, heads: int, rate: float
    ):
        super().__init__()
        self.characters = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.dropout = Dropout(rate)
        self.blocks = nn.ModuleList(Block(width, heads, rate) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.logits = nn.Linear(width, vocabulary)

    def forward(self, characters: Tensor, keys: Keys) -> Tensor:
        """Returns the logits of the next character at every position; no keys mean evaluation."""
        positions = torch.arange(characters.shape[-1], device=characters.device)
        x = self.characters(characters) + self.positions(positions)
        x = self.dropout(x, keys)
        for block in self.blocks:
            x = block(x, keys)
        return self.logits(self.norm(x))


# --- weights ------------------------------------------------------------------------------


def load_flax(model: nn.Module, params: Mapping[str, np.ndarray]) -> None:
    """Copies Flax's parameters, named by their paths, into the modules at the same paths."""
    with torch.no_grad():
        for name, ours in model.named_parameters():
            ours.copy_(torch.tensor(flax_value(name, tuple(ours.shape), params)))


def flax_value(name: str, shape: tuple[int, ...], values: Mapping[str, np.ndarray]) -> np.ndarray:
    """Flax's value for a parameter of PyTorch: a weight, a gradient, or a state of Adam."""
    path, _, kind = name.rpartition(".")
    if f"{path}.kernel" in values:
        if kind == "weight":
            # From (inputs, outputs), either of which attention splits into heads, to its transpose.
            return values[f"{path}.kernel"].reshape(shape[::-1]).T
        return values[f"{path}.bias"].reshape(shape)
    names = {"weight": ("scale", "embedding"), "bias": ("bias",)}[kind]
    theirs = next(values[f"{path}.{n}"] for n in names if f"{path}.{n}" in values)
    if theirs.shape != shape:
        raise ValueError(f"{name} has the shape {shape}, and Flax's {theirs.shape}.")
    return theirs


# --- training -----------------------------------------------------------------------------


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    # Optax's weight decay is 1e-4, PyTorch's 1e-2.
    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-4)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """`optax.warmup_cosine_decay_schedule`, which begins at 0: the first update changes nothing."""
    warmup = steps // 10
    if step < warmup:
        return peak * step / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def dropout_key(root: Key, step: int) -> Key:
    """The example's ``jax.random.split(jax.random.fold_in(root, step))[1]``."""
    return fold_in(fold_in(root, step), 1)


def loss_of(model: nn.Module, windows: Tensor, keys: Keys) -> Tensor:
    """Mean cross entropy of the next characters, in nats."""
    logits = model(windows[:, :-1], keys)
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    windows: Tensor,
    *,
    root: Key,
    step: int,
    steps: int,
    peak: float,
) -> float:
    """Runs one step and returns its loss. Its masks depend only on the root and the step."""
    optimizer.zero_grad()
    loss = loss_of(model, windows, calls(dropout_key(root, step)))
    loss.backward()
    clip_by_global_norm(model, 1.0)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, steps, peak)
    optimizer.step()
    return loss.item()


def clip_by_global_norm(model: nn.Module, limit: float) -> None:
    """Optax's; PyTorch's `clip_grad_norm_` adds 1e-6 to the norm, which is 1e-6 of it or more."""
    gradients = [parameter.grad for parameter in model.parameters()]
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    if norm >= limit:
        for gradient in gradients:
            gradient.mul_(limit / norm)
