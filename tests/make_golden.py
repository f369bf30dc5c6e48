"""Writes the known answers in tests/data from the NumPy twin: `python tests/make_golden.py`.

Run it to add a law version, never to change one: the vectors are a promise.
"""

import json
import pathlib

import law_twin
import numpy as np

CASES = [
    # what it checks, key words, rate, precision, shape, broadcast_dims, start, global_shape
    ("one digit, whole blocks", [0, 0], 0.5, None, [8, 16], [], None, None),
    ("a last block that is not full", [0, 42], 0.1, None, [33, 31], [], None, None),
    ("two digits", [0, 42], 0.1, 32, [33, 31], [], None, None),
    ("one axis", [0xFFFFFFFF, 0xFFFFFFFF], 0.25, None, [197], [], None, None),
    ("leading axes", [0x13198A2E, 0x03707344], 0.3, None, [2, 3, 5, 7], [], None, None),
    ("shared axes", [0x13198A2E, 0x03707344], 0.3, None, [2, 3, 5, 7], [1, -2], None, None),
    ("a key of four words", [1, 2, 3, 4], 0.6, None, [12, 10], [], None, None),
    ("a very small rate", [1, 2], 1e-4, None, [256, 128], [], None, None),
    ("axes of size 1", [1, 2], 0.9, None, [1, 40, 1, 6], [], None, None),
    ("no axes", [1, 2], 0.5, None, [], [], None, None),
    (
        "a start whose positions need 39 bits",
        [7, 9],
        0.5,
        None,
        [3, 5],
        [],
        [2**20 - 4, 2**20 - 6],
        [2**20, 2**20],
    ),
    (
        "a start in the middle of a block",
        [7, 9],
        0.5,
        None,
        [6, 8],
        [],
        [2**18 + 3, 2**17 + 1],
        [2**19, 2**18],
    ),
    (
        "a start on three axes",
        [7, 9],
        0.2,
        None,
        [2, 5, 4],
        [],
        [511, 8187, 16380],
        [1024, 8192, 16384],
    ),
    ("an index beyond 32 bits on one axis", [7, 9], 0.2, None, [64], [], [2**34 + 5], [2**35]),
]

SUBSETS = [
    # what it checks, key words, rate, size, groups, shape, start, global_shape
    ("one group", [0, 0], 0.5, 16, 1, [], None, None),
    ("a fractional count, rounded", [0, 42], 0.4, 32, 1, [], None, None),
    ("eight groups", [0, 42], 0.4, 32, 8, [], None, None),
    ("a row of subsets", [0xFFFFFFFF, 0xFFFFFFFF], 0.1, 12, 1, [3], None, None),
    ("1.5 of 2 are kept: to even", [0x13198A2E, 0x03707344], 0.25, 10, 5, [2, 4], None, None),
    ("2.5 of 5 are kept: to even", [0x13198A2E, 0x03707344], 0.5, 10, 2, [2], None, None),
    ("a key of four words", [1, 2, 3, 4], 0.7, 21, 3, [5], None, None),
    ("0.5 of 10: at least one is kept", [1, 2], 0.95, 10, 1, [4], None, None),
    ("at rate 1 one of each group is kept", [1, 2], 1.0, 9, 3, [], None, None),
    ("a start", [7, 9], 0.5, 8, 2, [2], [2**20 + 1, 2**18 - 8], [2**21, 2**18]),
    ("an index beyond 32 bits", [7, 9], 0.3, 16, 1, [], [2**34], [2**35]),
    ("2.5 of 50, though the double is not 0.95: to even", [1, 2], 0.95, 50, 1, [], None, None),
]

STRATA = [
    # what it checks, key words, (sample, size), rate, precision, shape, start, global_shape
    ("ten samples", [0, 0], (0, 10), 0.5, None, [8, 16], None, None),
    ("another of them", [0, 0], (9, 10), 0.5, None, [8, 16], None, None),
    ("one sample: the mask law", [0, 42], (0, 1), 0.1, None, [33, 31], None, None),
    ("two samples", [0, 42], (1, 2), 0.1, None, [33, 31], None, None),
    ("two multiples missing", [0xFFFFFFFF, 0xFFFFFFFF], (3, 8), 0.25, None, [197], None, None),
    ("a prime size", [1, 2, 3, 4], (5, 13), 0.3, None, [2, 5, 7], None, None),
    ("two digits", [0, 42], (4, 10), 0.1, 32, [33, 31], None, None),
    ("a very small rate", [1, 2], (7, 50), 1e-4, None, [256, 128], None, None),
    ("the largest size", [1, 2], (249, 250), 0.6, None, [12, 10], None, None),
    ("a start", [7, 9], (2, 10), 0.5, None, [6, 8], [2**18 + 3, 2**17 + 1], [2**19, 2**18]),
]

THRESHOLDS = [
    # what it checks, rate, precision
    ("nothing is dropped", 0.0, None),
    ("everything is dropped", 1.0, None),
    ("a rate that is exact", 0.5, None),
    ("a threshold that is rounded down", 0.1, None),
    ("a threshold that is rounded up", 0.2, None),
    ("16 bits miss by less than 0.1 %", 0.0079, None),
    ("16 bits miss by more than 0.1 %", 0.0078, None),
    ("two digits on request", 0.1, 32),
    ("one digit on request", 1e-4, 16),
    ("a tie of one digit: up to even", 2**-17, 16),
    ("a tie of one digit: down to even", 3 * 2**-17, 16),
    ("a tie of two digits: up to even", 2**-33, None),
    ("a tie of two digits: down to even", 3 * 2**-33, 32),
    ("almost everything is dropped", 1 - 2**-20, None),
]

ROOTS = [
    [0, 0],
    [0, 42],
    [0xFFFFFFFF, 0xFFFFFFFF],
    [0x13198A2E, 0x03707344],
    [0, 0, 0, 0],
    [1, 2, 3, 4],
]
POINTS = [
    # step, microbatch, site
    (0, 0, ["hidden"]),
    (0, 0, [0]),
    (1, 0, ["hidden"]),
    (0, 1, ["hidden"]),
    (1000, 3, ["decoder", 3, "mlp"]),
    (2**31 - 1, 0, ["decoder", 3]),
    (2**31, 2**31, ["decoder", 2**31]),
    (2**32 - 1, 2**32 - 1, ["decoder", 2**32 - 1]),
    (2**32, 0, ["params", "blocks", 0, "attention", "dropout", 11]),
    (2**62 + 12345, 7, [0, 1, 2]),
    (2**63 - 1, 0, [""]),
    (12345, 0, ["", "", 0, ""]),
    (7, 0, ["Größe", "層", "слой", "\N{PARTY POPPER}"]),
    (7, 0, ["a" * 1000]),
    (7, 0, ["3"]),
    (7, 0, [3]),
]


def main() -> None:
    masks = (
        "mask: hex of the bits in row-major order, 1 = kept, the first element in the highest "
        "bit of the first byte, zeros at the end; first_numbers: those of the first 8 elements"
    )
    thresholds = "rate: a double, of which the decimal digits are the shortest"
    write("golden_thresholds.json", thresholds, [threshold_vector(*case) for case in THRESHOLDS])
    write("golden_masks.json", masks, [mask_vector(*case) for case in CASES])
    subsets = "indices: of the kept elements, an array of shape (*shape, kept)"
    write("golden_subsets.json", subsets, [subset_vector(*case) for case in SUBSETS])
    keys = "step: 16 hex digits; site: names are strings, indices are numbers; key: its words"
    write(
        "golden_keys.json", keys, [key_vector(root, *point) for root in ROOTS for point in POINTS]
    )
    strata = (
        "mask: as in golden_masks.json; first_numbers: those of the first 8 elements, of one digit "
        "or two; first_strata: their strata, floor(2^16 stratum / size) of which is added"
    )
    write("golden_strata.json", strata, [strata_vector(*case) for case in STRATA])


def strata_vector(checks, words, sample, rate, precision, shape, start, whole) -> dict:
    mask = law_twin.keep_mask(words, rate, shape, (), start, whole, precision, sample)
    _, digits = law_twin.threshold(rate, precision)
    place = ((), start, whole)
    numbers = law_twin.port.uniform_numbers(words, digits, shape, *place, sample)
    alone = law_twin.port.uniform_numbers(words, digits, shape, *place)
    shift = (numbers - alone) >> (16 * (digits - 1)) & 0xFFFF
    return {
        "checks": checks,
        "key_words": in_hex(words),
        "sample": sample[0],
        "size": sample[1],
        "rate": rate,
        "precision": precision,
        "digits": digits,
        "shape": shape,
        "start": start,
        "global_shape": whole,
        "first_strata": [-(-int(s) * sample[1] // 2**16) for s in shift.reshape(-1)[:8]],
        "first_numbers": numbers.reshape(-1)[:8].tolist(),
        "mask": np.packbits(mask.reshape(-1)).tobytes().hex(),
    }


def subset_vector(checks, words, rate, size, groups, shape, start, whole) -> dict:
    indices = law_twin.keep_indices(words, rate, size, groups, shape, start, whole)
    return {
        "checks": checks,
        "key_words": in_hex(words),
        "rate": rate,
        "size": size,
        "groups": groups,
        "shape": shape,
        "start": start,
        "global_shape": whole,
        "indices": indices.tolist(),
    }


def threshold_vector(checks, rate, precision) -> dict:
    number, digits = law_twin.threshold(rate, precision)
    return {
        "checks": checks,
        "rate": rate,
        "precision": precision,
        "threshold": number,
        "digits": digits,
    }


def mask_vector(checks, words, rate, precision, shape, broadcast_dims, start, whole) -> dict:
    mask = law_twin.keep_mask(words, rate, shape, broadcast_dims, start, whole, precision)
    t, digits = law_twin.threshold(rate, precision)
    numbers = law_twin.port.uniform_numbers(words, digits, shape, broadcast_dims, start, whole)
    numbers = np.broadcast_to(numbers, shape)
    return {
        "checks": checks,
        "key_words": in_hex(words),
        "rate": rate,
        "precision": precision,
        "threshold": t,
        "digits": digits,
        "shape": shape,
        "broadcast_dims": broadcast_dims,
        "start": start,
        "global_shape": whole,
        "mask_keys": [in_hex(law_twin.port.mask_key(words, digit)) for digit in range(digits)],
        "first_numbers": numbers.reshape(-1)[:8].tolist(),
        "mask": np.packbits(mask.reshape(-1)).tobytes().hex(),
    }


def key_vector(root, step, microbatch, site) -> dict:
    return {
        "root_words": in_hex(root),
        "step": f"{step:016x}",  # not a number: JSON's may be doubles
        "microbatch": microbatch,
        "site": site,
        "key_words": in_hex(law_twin.site_key(root, step, site, microbatch)),
    }


def in_hex(words) -> list[str]:
    return [f"{word:08x}" for word in words]


def write(name: str, text: str, vectors: list[dict]) -> None:
    lines = ",\n    ".join(json.dumps(vector) for vector in vectors)
    (pathlib.Path(__file__).parent / "data" / name).write_text(
        f'{{\n  "law_version": 1,\n  "format": "{text}",\n  "vectors": [\n    {lines}\n  ]\n}}\n'
    )


if __name__ == "__main__":
    main()
