"""Bounds of what compilers make of this library for a TPU that need not be there.

Run by `pip install "jax[tpu]" optax rich` and `pytest tests/test_compiled.py -m compiled`.
"""

import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.compiled

ROOT = pathlib.Path(__file__).parent.parent
BUNDLES = {
    "dropout (4096, 4096) float32": 0.19,
    "dropout (4096, 4096) bfloat16": 0.20,
    "bias_dropout_add (4096, 4096) float32": 0.20,
    "bias_dropout_add (4096, 4096) bfloat16": 0.24,
    "attention_forward, rate 0.1": 10.2,
    "attention_backward, rate 0.1": 11.2,
    "attention_forward, without": 3.7,
    "attention_backward, without": 5.9,
    "attention_forward, causal, rate 0.1": 10.4,
    "attention_backward, causal, rate 0.1": 11.2,
}
"""Millions, a few percent above what JAX 0.10.2 takes."""


@pytest.fixture(scope="module")
def kernels():
    command = [sys.executable, "compiled.py", "--platform", "tpu", "--only", "kernels"]
    run = subprocess.run(
        command, cwd=ROOT / "benchmarks", capture_output=True, text=True, timeout=900, check=True
    )
    rows = [line.strip("| ").split(" | ") for line in run.stdout.splitlines() if "|" in line]
    return {name: float(millions) for name, _, millions, _ in rows[2:]}


def test_kernels_stay_within_their_bundles(kernels):
    assert kernels.keys() == BUNDLES.keys()
    assert {name: n for name, n in kernels.items() if n > BUNDLES[name]} == {}
