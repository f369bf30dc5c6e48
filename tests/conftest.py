"""A stricter environment than any user's: what passes here passes there."""

import gc
import importlib.metadata
import os
import pathlib

# The threads of NumPy's matrix products wait for each other in loops, which doubles the time of
# test_statistics.py where as many workers as cores run. Read when NumPy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import pytest

ROOT = pathlib.Path(__file__).parent.parent

# test_sharded.py runs its folder in processes with eight devices; Atheris runs the file.
collect_ignore = ["sharded", "fuzz_checks.py"]

# 0.25 s a program and thousands of programs: the second run reads them from a directory, and so
# do the processes that tests start, which inherit the environment.
COMPILATION_CACHE = {
    "jax_compilation_cache_dir": str(ROOT / ".jax_cache" / importlib.metadata.version("jax")),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
for name, value in COMPILATION_CACHE.items():
    if name.upper() not in os.environ:
        os.environ[name.upper()] = str(value)
        jax.config.update(name, value)

# XLA's older emitters compile programs up to three times as fast, where JAX still has them. Tests
# of the law and of costs use those that users have (cheap.users_jit), and CI's newest JAX does.
if jax.__version_info__ < (0, 11):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(20140614)


# What takes longest goes first, so that no worker is left alone with it at the end.
LONGEST = (
    "test_sharded",
    "test_examples",
    "test_law",
    "test_resume",
    "test_audit_flax",
    "test_statistics",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in LONGEST)


def pytest_collection_finish():
    """Makes garbage collection cheap: tracing makes garbage fast, and imported modules are none."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


# Compiled as users' programs are. Elsewhere LLVM's optimizations would double the time of a
# compilation, and most programs run once.
OPTIMIZED = {"test_law", "test_costs", "test_properties", "test_residual", "test_dropout"}


@pytest.fixture(scope="module", autouse=True)
def compilation(request):
    """Compiles a file's programs with or without optimizations, and forgets them after it."""
    name = request.path.stem
    quickly = name.startswith("test_") and name not in OPTIMIZED
    jax.config.update("jax_disable_most_optimizations", quickly)
    yield
    jax.clear_caches()  # compiled programs stay in memory until then
