"""Compiles dropout for a device that need not be there, and prints what the compiler made of it.

    pip install "jax[tpu]" flax optax rich && python benchmarks/compiled.py --platform tpu
    pip install "jax[cuda12]" flax optax rich && python benchmarks/compiled.py --platform cuda
    pip install jax flax optax rich && python benchmarks/compiled.py --platform cpu

Nothing is run: the tables count what is in the programs, and none of it is a time on the device.
"""

import argparse
import os

os.environ |= {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}

import functools
import pathlib
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import harness
import jax
import jax.numpy as jnp
import optax
import program_costs
import subset
import transformer
from attention import attention_passes, attentions, ours
from cases import layers
from common import DTYPES, KEY, RATE, Function, copy, identity, libraries
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import jdropout

DUMP = tempfile.TemporaryDirectory()
"""What the TPU's compiler writes of its kernels."""
SHAPES = ((4096, 4096), (128, 197, 768), (64, 56, 56, 64), (8, 8, 512, 512), (1024, 784))
LAYERS, BLOCKS = 12, 2
ATTENTION = (8, 2048, 16, 128)
DEVICES = {"tpu": "TPU v5e", "cuda": "NVIDIA H100", "cpu": "the CPU"}
"""What each platform's programs are compiled for."""


class Program(NamedTuple):
    """Counts of a compiled program."""

    costs: program_costs.Costs
    temporaries: int
    seconds: float
    """CPU time to trace, lower and compile."""
    flops: float | None
    """As the compiler counts them, if it does."""


class Device(NamedTuple):
    """What programs are compiled for."""

    platform: str
    sharding: SingleDeviceSharding

    def compile(self, function: Function, *arguments: Any) -> Program:
        """Compiles for arrays, keys and their shapes, in trees."""

        def placed(x: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.sharding)

        arguments = jax.tree.map(placed, jax.eval_shape(lambda: arguments))
        jax.clear_caches()
        start = time.process_time()
        program = jax.jit(function).lower(*arguments).compile()
        seconds = time.process_time() - start
        analysis = program.cost_analysis() or {}
        return Program(
            program_costs.costs(program.as_text()),
            program.memory_analysis().temp_size_in_bytes,
            seconds,
            analysis.get("flops"),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--platform", choices=DEVICES, required=True)
    parser.add_argument("--only", nargs="*", choices=[f.__name__ for f in SECTIONS])
    options = parser.parse_args()
    if options.only == [kernels.__name__]:  # it would slow the others down
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={DUMP.name} --xla_jf_dump_llo_text=true"
    device = describe(options.platform)
    device.compile(copy, KEY, jnp.ones(8))  # starts the compiler
    print(f"# Programs for {DEVICES[device.platform]}, jax {jax.__version__}\n")
    print(f"Made by `python benchmarks/compiled.py --platform {device.platform}`. Nothing was run.")
    for section in SECTIONS:
        if not options.only or section.__name__ in options.only:
            print(f"\n## {section.__doc__}\n", flush=True)
            for row in section(device):
                print(f"| {' | '.join(row)} |", flush=True)


def describe(platform: str) -> Device:
    (cpu, *_) = jax.devices()  # also makes JAX find the plugins of other platforms
    if platform == "cpu":
        return Device(platform, SingleDeviceSharding(cpu))
    if platform == "tpu":
        topology = topologies.get_topology_desc("v5e:2x2", platform="tpu")
    else:
        target = (pathlib.Path(__file__).parent / "h100.txtpb").read_text()
        topology = topologies.get_topology_desc(
            "h100", platform="cuda", topology="1x1x1", target_config=target
        )
    return Device(platform, SingleDeviceSharding(topology.devices[0]))


# --- tables -------------------------------------------------------------------------------


Rows = Iterator[tuple[str, ...]]


def header(*columns: str) -> Rows:
    """The names of the columns: the first one holds labels, the others numbers."""
    yield columns
    yield ("---", *["--:"] * (len(columns) - 1))


def compared_columns(device: Device) -> Rows:
    """A cell has three numbers: with our dropout, with Flax's, and with none."""
    cycles = ["cycles over none"] if device.platform == "tpu" else []
    columns = ("launches", "MB accessed", "MB of temporaries", *cycles, "compile time over Flax")
    yield from header("ours, Flax, none", *columns)


def compared(device: Device, label: str, functions: dict[str, Function], *arguments: Any) -> Rows:
    programs = [device.compile(functions[name], *arguments) for name in ("ours", "flax", "none")]
    _, flax, none = programs
    found: list[tuple[Callable[[Program], float], str]] = [
        (lambda p: p.costs.launches, ".0f"),
        (lambda p: p.costs.bytes / 1e6, ".1f"),
        (lambda p: p.temporaries / 1e6, ".1f"),
        (lambda p: p.seconds / flax.seconds, ".1f"),
    ]
    if device.platform == "tpu":
        found.insert(3, (lambda p: p.costs.cycles / none.costs.cycles, ".2f"))
    yield label, *(", ".join(format(get(p), spec) for p in programs) for get, spec in found)


def drops() -> dict[str, Function]:
    found = libraries()
    return {"ours": found["ours"], "flax": found["flax"], "none": identity}


# --- sections -----------------------------------------------------------------------------


def dropout(device: Device) -> Rows:
    """Dropout, and the gradient of sum(sin(dropout(cos(x)))); "none" is x * 2 in the former"""
    yield from compared_columns(device)

    def gradient(drop: Function) -> Function:
        return jax.grad(lambda x, key: jnp.sin(drop(key, jnp.cos(x))).sum())

    for shape in SHAPES:
        for dtype in DTYPES:
            x = jax.ShapeDtypeStruct(shape, dtype)
            label = f"{shape} {x.dtype}"
            yield from compared(device, label, drops() | {"none": copy}, KEY, x)
            if dtype == jnp.float32:
                gradients = {name: gradient(drop) for name, drop in drops().items()}
                yield from compared(device, f"{label}, gradient", gradients, x, KEY)


def networks(device: Device) -> Rows:
    """A gradient of layers dropout(tanh(x @ w)), and a training step of a transformer"""
    yield from compared_columns(device)
    plan = harness.FULL._replace(layers=LAYERS)
    for batch, width, dtype in ((256, 512, jnp.float32), (2048, 2048, jnp.bfloat16)):
        gradients = {name: layers(drop, jax.random.fold_in, plan) for name, drop in drops().items()}
        w, x = (jax.ShapeDtypeStruct((rows, width), dtype) for rows in (width, batch))
        yield from compared(device, f"{LAYERS} layers, {x.shape} {x.dtype}", gradients, w, x, KEY)

    optimizer = optax.adamw(1e-3)
    params = [transformer.block_params(key) for key in jax.random.split(KEY, BLOCKS)]
    shape = (transformer.BATCH, transformer.LENGTH, transformer.WIDTH)
    attend = attentions(is_causal=True)
    steps = {
        name: transformer.training_step(optimizer, attend[of_attention], drops()[name])
        for name, of_attention in (("ours", "ours"), ("flax", "flax"), ("none", "jax.nn"))
    }
    arguments = (params, optimizer.init(params), KEY, jax.ShapeDtypeStruct(shape, jnp.float32))
    yield from compared(device, f"transformer of {BLOCKS} blocks, {shape}", steps, *arguments)


def attention(device: Device) -> Rows:
    """Attention, (B, T, N, H) = (8, 2048, 16, 128), bfloat16, rate 0.1, by block size (T, S)"""
    cycles = ("millions of cycles",) if device.platform == "tpu" else ()
    columns = ("launches", "GB accessed", "MB of temporaries", *cycles)
    yield from header("forward, gradient", *columns)
    functions = attentions(is_causal=False)
    del functions["jax.nn"]
    for sizes in BLOCK_SIZES[device.platform]:
        functions[f"ours, {sizes[0]} x {sizes[1]}"] = ours(block_sizes=sizes)
    x = jax.ShapeDtypeStruct(ATTENTION, jnp.bfloat16)
    passes = attention_passes(functions)
    for name in functions:
        both = [device.compile(of_pass[name], KEY, x, x, x) for of_pass in passes.values()]
        cells = [[f"{p.costs.launches}" for p in both]]
        cells += [[f"{p.costs.bytes / 1e9:.1f}" for p in both]]
        cells += [[f"{p.temporaries / 1e6:.0f}" for p in both]]
        cells += [[f"{p.costs.cycles / 1e6:.1f}" for p in both] for _ in cycles]
        yield name, *(", ".join(cell) for cell in cells)


_LARGE = ((512, 512), (512, 1024), (512, 2048), (1024, 1024), (1024, 2048), (2048, 512))
BLOCK_SIZES = {
    "cpu": ((128, 128), (512, 256), (512, 512)),
    "tpu": ((128, 128), (256, 2048), (512, 256), *_LARGE[:4]),
    "cuda": (*_LARGE, (2048, 1024), (2048, 2048)),
}


def subsets(device: Device) -> Rows:
    """A gradient step of two transformer blocks, over the same without dropout"""
    yield from header("dropout", "rate", "FLOPs", "bytes accessed", "temporaries")
    keys = jax.random.split(KEY, subset.BLOCKS)
    params = jax.vmap(subset.block_params)(keys)
    x = jax.ShapeDtypeStruct((subset.BATCH, subset.LENGTH, subset.WIDTH), jnp.float32)

    def compiled(function: Function, rate: float) -> list[float | None]:
        step = subset.gradient(functools.partial(function, rate=rate))
        program = device.compile(step, params, KEY, x)
        return [program.flops, program.costs.bytes, program.temporaries]

    functions = subset.stacks()
    none = compiled(functions.pop("none"), 0.0)
    for name, function in functions.items():
        for rate in subset.RATES:
            try:
                found = compiled(function, rate)
            except jax.errors.JaxRuntimeError:
                # XLA:GPU finds no tiles for some products without a GPU to try them on.
                yield name, str(rate), *["not compiled"] * 3
                continue
            pairs = zip(found, none, strict=True)
            cells = ["-" if a is None or b is None else f"{a / b:.2f}" for a, b in pairs]
            yield name, str(rate), *cells


def kernels(device: Device) -> Rows:
    """Pallas kernels: final bundles, with rare branches, times steps of the grid"""
    yield from header("kernel", "bundles of a step", "millions of bundles", "over cycles of x * 2")
    if device.platform != "tpu" or "LIBTPU_INIT_ARGS" not in os.environ:
        yield "for a TPU, with `--only kernels`", "-", "-", "-"
        return
    for dtype in DTYPES:
        x = jax.ShapeDtypeStruct((4096, 4096), dtype)
        copied = device.compile(copy, KEY, x).costs.cycles
        bias = jax.ShapeDtypeStruct((4096,), dtype)
        for name, operands in (("dropout", (x,)), ("bias_dropout_add", (x, bias, x))):
            function = getattr(jdropout, name)
            found = bundles(
                device,
                lambda key, *operands, function=function: function(
                    key, *operands, RATE, implementation="pallas"
                ),
                KEY,
                *operands,
            )
            total = found["dropout"] * 4096 * 4096 // (256 * 512)
            cells = (f"{found['dropout']}", f"{total / 1e6:.3f}", f"{total / copied:.2f}")
            yield f"{name} (4096, 4096) {x.dtype}", *cells

    x = jax.ShapeDtypeStruct(ATTENTION, jnp.bfloat16)
    batch, length, heads, _ = ATTENTION
    steps = batch * heads * length * length // (512 * 1024)
    for label, options in KERNEL_CASES.items():
        function = ours(implementation="pallas", **options)
        passes = attention_passes({"ours": function})
        found = bundles(device, passes["gradient"]["ours"], KEY, x, x, x)
        for name in ("attention_forward", "attention_backward"):
            yield f"{name}, {label}", f"{found[name]}", f"{found[name] * steps / 1e6:.1f}", "-"


KERNEL_CASES: dict[str, dict[str, Any]] = {
    "rate 0.1": {},
    "without": {"deterministic": True},
    "causal, rate 0.1": {"is_causal": True},
}


def bundles(device: Device, function: Function, *arguments: Any) -> dict[str, int]:
    """Compiles kernels and returns the length of each in bundles, by its name."""
    for path in pathlib.Path(DUMP.name).iterdir():
        path.unlink()
    device.compile(function, *arguments)
    found = {}
    for path in pathlib.Path(DUMP.name).glob("*schedule-analysis_final_bundles.txt"):
        name = path.name.split("-")[1].split(".")[0]
        count = re.search(r"total scheduled bundles:\s+(\d+)", path.read_text())
        if count and "TLP" not in path.name:
            found[name] = int(count[1])
    return found


SECTIONS = (dropout, networks, attention, kernels, subsets)
"""A section is a generator of rows; its docstring is the title."""


if __name__ == "__main__":
    main()
