"""The laws of masks, subsets and keys once more: the port to NumPy, which shares no code with us.

Here are the arguments that tests use, by position, and 64-bit numbers, which can be compared with
a threshold of 2**32.
"""

import importlib.util
import pathlib
import types

import numpy as np

PORTS = pathlib.Path(__file__).parent.parent / "ports"


def load_port(path: str) -> types.ModuleType:
    """Imports a file of a folder that is not on the path: users copy it."""
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, PORTS / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


port = load_port("numpy/jdropout_numpy.py")
threefry2x32, threshold, kept_count = port.threefry2x32, port.threshold, port.kept_count
at_site, name_counter = port.at_site, port.name_counter


def site_key(key_words, step, site, microbatch=0):
    return port.site_key(key_words, step=step, site=site, microbatch=microbatch)


def mask_keys(key_words, digits):
    """The words of the keys of as many digits."""
    words = [port.mask_key(key_words, digit) for digit in range(digits)]
    return np.array(words, np.uint32).reshape(-1)


def keep_mask(
    key_words,
    rate,
    shape,
    broadcast_dims=(),
    start=None,
    whole=None,
    precision=None,
    sample=None,
):
    place = {"broadcast_dims": broadcast_dims, "start": start, "global_shape": whole}
    return port.keep_mask(key_words, rate, shape, precision=precision, sample=sample, **place)


def uniform(key_words, shape, broadcast_dims=(), start=None, whole=None, sample=None):
    """The uniform numbers that noise is made of: both digits, in units of 2^-32."""
    numbers = port.uniform_numbers(key_words, 2, shape, broadcast_dims, start, whole, sample)
    return np.broadcast_to(numbers.astype(np.uint64), shape)


def keep_indices(key_words, rate, size, groups=1, shape=(), start=None, whole=None, sample=None):
    place = {"start": start, "global_shape": whole, "sample": sample}
    return port.keep_indices(key_words, rate, size, groups=groups, shape=shape, **place)
