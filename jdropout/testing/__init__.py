"""Assertions for your own tests of masks, layers with dropout, and whole training runs.

Each raises an AssertionError if its property does not hold, and a ValueError or TypeError
if the test could not show anything. No test framework is needed.
"""

from jdropout.testing._backward import (
    assert_backward_uses_forward_mask as assert_backward_uses_forward_mask,
)
from jdropout.testing._bits import assert_reproducible as assert_reproducible
from jdropout.testing._bits import mask_fingerprint as mask_fingerprint
from jdropout.testing._determinism import check_determinism as check_determinism
from jdropout.testing._determinism.report import DeterminismFinding as DeterminismFinding
from jdropout.testing._determinism.report import DeterminismPlace as DeterminismPlace
from jdropout.testing._determinism.report import DeterminismReport as DeterminismReport
from jdropout.testing._expectation import assert_unbiased as assert_unbiased
from jdropout.testing._first_difference import Difference as Difference
from jdropout.testing._first_difference import first_difference as first_difference
from jdropout.testing._recording import Recording as Recording
from jdropout.testing._recording import record as record
from jdropout.testing._shardings import assert_sharding_invariant as assert_sharding_invariant
from jdropout.testing._training import record_training as record_training

__all__ = [
    "DeterminismFinding",
    "DeterminismPlace",
    "DeterminismReport",
    "Difference",
    "Recording",
    "assert_backward_uses_forward_mask",
    "assert_reproducible",
    "assert_sharding_invariant",
    "assert_unbiased",
    "check_determinism",
    "first_difference",
    "mask_fingerprint",
    "record",
    "record_training",
]
