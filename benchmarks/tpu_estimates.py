"""Compiles dropout for a TPU v5e, without needing one, and prints the compiler's estimates.

    pip install "jax[tpu]" flax rich && python benchmarks/tpu_estimates.py

In the first table a cell is the sum of `estimated_cycles` in the compiled program, divided by the
same sum for `x * 2`: a model, not a measurement. In the second one it is the compiler's count of
FLOPs, of bytes and of temporaries, divided by the one without dropout. The third one compares
attention by block size. Nothing is run.
"""

import os

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import subset
from flax import nnx
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import jdropout

RATE = 0.1
BLOCKS = ((128, 128), (512, 256), (512, 512), (512, 1024), (512, 2048), (256, 2048), (1024, 1024))
SHAPES = ((4096, 4096), (128, 197, 768), (64, 56, 56, 64), (8, 8, 512, 512), (1024, 784))


def main() -> None:
    topology = topologies.get_topology_desc("v5e:2x2", platform="tpu")
    sharding = SingleDeviceSharding(topology.devices[0])
    print_dropout(sharding)
    print_subsets(sharding)
    print_attention(sharding)


def print_dropout(sharding: SingleDeviceSharding) -> None:
    key = jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=sharding)
    print(f"TPU v5e, jax {jax.__version__}: estimated cycles over those of x * 2\n")
    print("| shape | dtype | ours | Flax-style | ours, temporaries | Flax-style, temporaries |")
    print("|---|---|--:|--:|--:|--:|")
    for shape in SHAPES:
        for dtype in (jnp.float32, jnp.bfloat16):
            x = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
            copy, _ = estimate(lambda key, x: x * 2, key, x)
            ours, ours_bytes = estimate(lambda key, x: jdropout.dropout(key, x, RATE), key, x)
            flax, flax_bytes = estimate(flax_style, key, x)
            cells = (f"{ours / copy:.2f}", f"{flax / copy:.2f}")
            memory = (f"{ours_bytes / 1e6:.2f} MB", f"{flax_bytes / 1e6:.2f} MB")
            print(f"| {shape} | {jnp.dtype(dtype)} | {' | '.join((*cells, *memory))} |")


def print_subsets(sharding: SingleDeviceSharding) -> None:
    """The gradient step of the section `subset`."""

    def placed(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    keys = jax.random.split(subset.KEY, subset.BLOCKS)
    params = jax.tree.map(placed, jax.eval_shape(jax.vmap(subset.block_params), keys))
    shape = (subset.BATCH, subset.LENGTH, subset.WIDTH)
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    words = jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=sharding)

    def costs(function: Callable[..., jax.Array], rate: float) -> list[float]:
        step = subset.gradient(functools.partial(function, rate=rate))
        jitted = jax.jit(lambda params, key, x: step(params, jax.random.wrap_key_data(key), x))
        program = jitted.lower(params, words, x).compile()
        analysis = program.cost_analysis()
        memory = program.memory_analysis().temp_size_in_bytes
        return [analysis["flops"], analysis["bytes accessed"], memory]

    functions = subset.stacks()
    none = costs(functions.pop("none"), 0.0)
    print(f"\nA gradient step of {subset.BLOCKS} transformer blocks, {shape}, over no dropout\n")
    print("| dropout | rate | FLOPs | bytes accessed | temporaries |")
    print("|---|--:|--:|--:|--:|")
    for name, function in functions.items():
        for rate in subset.RATES:
            pairs = zip(costs(function, rate), none, strict=True)
            print(f"| {name} | {rate} | {' | '.join(f'{a / b:.2f}' for a, b in pairs)} |")


def print_attention(sharding: SingleDeviceSharding) -> None:
    """Attention by block size; cycles of loops count as often as they run."""
    shape = (8, 2048, 16, 128)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)
    words = jax.ShapeDtypeStruct((2,), jnp.uint32, sharding=sharding)
    print(f"\nAttention, (B, T, N, H) = {shape}, bfloat16, rate {RATE}: millions of cycles\n")
    print("| | forward | gradient | temporaries of the gradient |")
    print("|---|--:|--:|--:|")
    flax = functools.partial(nnx.dot_product_attention, dropout_rate=RATE, broadcast_dropout=False)
    functions: dict[str, Callable[..., jax.Array]] = {
        "Flax": lambda key, *inputs: flax(*inputs, dropout_rng=jax.random.wrap_key_data(key)),
        "Flax without": lambda key, *inputs: flax(*inputs, deterministic=True),
        "ours, default blocks": attention(),
        "ours without": attention(deterministic=True),
    }
    for sizes in BLOCKS:
        functions[f"ours, blocks of {sizes[0]} x {sizes[1]}"] = attention(block_sizes=sizes)

    for name, function in functions.items():

        def loss(inputs: tuple[jax.Array, ...], key: jax.Array, function: Any = function) -> Any:
            return (function(key, *inputs) * inputs[0]).sum().astype(jnp.float32)

        forward, _ = estimate(function, words, x, x, x)
        gradient, temporaries = estimate(
            lambda key, *inputs, loss=loss: jax.grad(loss)(inputs, key), words, x, x, x
        )
        cells = (f"{forward / 1e6:.1f}", f"{gradient / 1e6:.1f}", f"{temporaries / 1e6:.0f} MB")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def attention(**options: Any) -> Callable[..., jax.Array]:
    return lambda key, *inputs: jdropout.dot_product_attention(
        *inputs, dropout_key=key, dropout_rate=RATE, **options
    )


def flax_style(key: jax.Array, x: jax.Array) -> jax.Array:
    """The expression that Flax's Dropout uses."""
    keep = jax.random.bernoulli(jax.random.wrap_key_data(key), 1 - RATE, x.shape)
    return jax.lax.select(keep, x / (1 - RATE), jnp.zeros_like(x))


def estimate(function: Callable[..., jax.Array], *arguments: jax.ShapeDtypeStruct) -> tuple:
    """Returns the compiled program's estimated cycles, and the bytes of its temporaries."""
    compiled = jax.jit(function).lower(*arguments).compile()
    return cycles(compiled.as_text()), compiled.memory_analysis().temp_size_in_bytes


def cycles(text: str) -> int:
    """Sums the estimated cycles of a program; the body of a loop counts as often as it runs."""
    computations: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{$", line):
            name = header[2]
            entry = name if header[1] else entry
            computations[name] = []
        elif name:
            computations[name].append(line)

    @functools.cache
    def of(name: str) -> int:
        return sum(of_line(line) for line in computations[name])

    def of_line(line: str) -> int:
        if loop := re.search(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)", line):
            bounds = re.findall(r" s32\[\]\S* constant\((\d+)\)", "\n".join(computations[loop[1]]))
            return int(bounds[0]) * of(loop[2])  # a scan compares its counter with a constant
        if branches := re.search(r" conditional\(.*branch_computations=\{([^}]*)\}", line):
            return max(of(branch.strip(" %")) for branch in branches[1].split(","))
        if called := re.search(r" call\(.*to_apply=%?([\w.-]+)", line):
            return of(called[1])
        count = re.search(r'"estimated_cycles":"(\d+)"', line)
        return int(count[1]) if count else 0

    return of(entry)


if __name__ == "__main__":
    main()
