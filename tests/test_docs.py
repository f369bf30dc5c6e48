"""The pages whose code the documentation's build does not run: it runs here.

The tests of the audit, recordings, resuming, testing and uncertainty run their own pages' code.
"""

import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jdropout
import jdropout.equinox
import jdropout.nnx
from jdropout.keys import site_key

DOCS = pathlib.Path(__file__).parent.parent / "docs"


@pytest.mark.parametrize(
    "page", ["attention", "choose", "keys", "performance", "schedules", "subsets"]
)
def test_the_code_of_a_page_runs(page):
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / f"{page}.md").read_text(), re.S | re.M)
    names = {}
    for block in blocks:
        exec(compile(block, f"{page}.md", "exec"), names)
    assert len(blocks) >= 1


def test_what_migrants_are_told_to_write_runs():
    text = (DOCS / "migration.md").read_text()
    x, key, rngs = jnp.ones((2, 4, 8, 8)), jax.random.key(0), nnx.Rngs(0)
    names = vars(jdropout) | {
        "block": jnp.tanh,
        "depth": 3,
        "f": jnp.tanh,
        "flag": False,
        "hk": type("haiku", (), {"next_rng_key": lambda: key}),
        "jax": jax,
        "key": key,
        "p": 0.25,
        "rate": 0.25,
        "rngs": rngs,
        "root": key,
        "scale_by_keep": False,
        "site_key": site_key,
        "stddev": 0.5,
        "step": 3,
        "tokens": jnp.ones((2, 9, 8)),
        "train": True,
        "x": x,
    }
    names |= dict.fromkeys("qkv", jnp.ones((2, 8, 2, 4)))
    count = 0
    for section in re.split(r"^## From (?!Flax)", text, flags=re.M)[1:]:
        for cell in re.findall(r"^\|.*\| ([^|]*) \|$", section, re.M):
            for code in re.findall(r"`([a-z_.]+\(.*?)`", cell):
                eval(code, names)
                count += 1
    assert count > 25
