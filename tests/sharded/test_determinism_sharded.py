"""What `check_determinism` says about programs for several devices."""

import jax
import jax.numpy as jnp
import real_cases
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jdropout.testing import check_determinism


def test_a_draw_that_depends_on_the_number_of_devices_is_located():
    found = real_cases.assert_located(real_cases.keys_of_the_kind_rbg())
    assert found == {"rbg", "rbg-vmap", "x64"}


def test_sums_that_the_partitioner_may_split_need_nccl_to_be_pinned():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, P("data"))

    def codes(x, **environment):
        report = check_determinism(jnp.sum, x, platform="cuda", environment=environment)
        return [finding.code for finding in report.findings]

    x = jax.device_put(jnp.ones((8, 4)), rows)
    assert codes(x) == ["nccl", "sum-order"]
    assert codes(x, NCCL_ALGO="Ring") == ["sum-order"]
    assert codes(jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=rows)) == ["nccl", "sum-order"]
    assert codes(jnp.ones((8, 4))) == ["sum-order"]
