"""The settings of the compiler and the libraries under it, read from environment variables."""

import shlex
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

_NCCL_ALGORITHMS = ("Tree", "Ring", "CollnetDirect", "CollnetChain", "^NVLS")
"""What Megatron-LM's deterministic mode accepts; it refuses to start with anything else."""


class Environment(NamedTuple):
    """What the settings say about determinism."""

    excludes_nondeterministic: bool
    """Whether XLA for GPUs replaces operations whose order is free."""
    autotuning: tuple[str, ...]
    """What the choice of kernels on a GPU can differ between."""
    nccl_pinned: bool
    isa_pinned: bool
    rbg_follows_sharding: bool
    """Whether every TPU draws its own part of an array of random numbers."""


def read(variables: Mapping[str, str]) -> Environment:
    flags = _flags(variables.get("XLA_FLAGS", ""))
    deterministic = _on(flags, "xla_gpu_deterministic_ops")
    return Environment(
        deterministic or _on(flags, "xla_gpu_exclude_nondeterministic_ops"),
        () if deterministic else _autotuning(flags),
        variables.get("NCCL_ALGO") in _NCCL_ALGORITHMS,
        bool(flags.get("xla_cpu_max_isa")),
        _on(
            flags | _flags(variables.get("LIBTPU_INIT_ARGS", "")),
            "xla_tpu_spmd_rng_bit_generator_unsafe",
        ),
    )


def _autotuning(flags: Mapping[str, str]) -> tuple[str, ...]:
    if flags.get("xla_gpu_autotune_level") == "0" or flags.get(
        "xla_gpu_load_autotune_results_from"
    ):
        return ()
    # JAX puts the choices next to its compilation cache, unless it is told not to.
    config: Any = jax.config  # whose options have no types
    caches = str(config.jax_persistent_cache_enable_xla_caches)
    kept = config.jax_compilation_cache_dir and (
        caches == "all" or "xla_gpu_per_fusion_autotune_cache_dir" in caches
    )
    if kept or flags.get("xla_gpu_per_fusion_autotune_cache_dir"):
        return ("machines",)
    return ("runs", "machines")


def _flags(text: str) -> dict[str, str]:
    words = (word.lstrip("-").partition("=") for word in shlex.split(text) if word[:2] == "--")
    return {name: value if equals else "true" for name, equals, value in words}


def _on(flags: Mapping[str, str], name: str) -> bool:
    return flags.get(name, "").lower() in ("1", "true", "t", "yes")
