"""Writes tests/data/golden_masks.json, from the NumPy twin: `python tests/make_golden.py`.

Run it to add a law version, never to change one: the vectors are a promise.
"""

import json
import pathlib

import law_twin
import numpy as np

CASES = [
    # key words, rate, precision, shape, broadcast_dims, start, global_shape
    ([0, 0], 0.5, None, [8, 16], [], None, None),
    ([0, 42], 0.1, None, [33, 31], [], None, None),
    ([0, 42], 0.1, 32, [33, 31], [], None, None),
    ([0xFFFFFFFF, 0xFFFFFFFF], 0.25, None, [197], [], None, None),
    ([0x13198A2E, 0x03707344], 0.3, None, [2, 3, 5, 7], [], None, None),
    ([0x13198A2E, 0x03707344], 0.3, None, [2, 3, 5, 7], [1, -2], None, None),
    ([1, 2, 3, 4], 0.6, None, [12, 10], [], None, None),
    ([1, 2], 1e-4, None, [256, 128], [], None, None),
    ([1, 2], 0.9, None, [1, 40, 1, 6], [], None, None),
    ([1, 2], 0.5, None, [], [], None, None),
    ([7, 9], 0.5, None, [3, 5], [], [2**20 - 4, 2**20 - 6], [2**20, 2**20]),
    ([7, 9], 0.5, None, [6, 8], [], [2**18 + 3, 2**17 + 1], [2**19, 2**18]),
    ([7, 9], 0.2, None, [2, 5, 4], [], [511, 8187, 16380], [1024, 8192, 16384]),
    ([7, 9], 0.2, None, [64], [], [2**34 + 5], [2**35]),
]


def main() -> None:
    vectors = []
    for words, rate, precision, shape, broadcast_dims, start, whole in CASES:
        mask = law_twin.keep_mask(words, rate, shape, broadcast_dims, start, whole, precision)
        t, digits = law_twin.threshold(rate, precision)
        vectors.append(
            {
                "key_words": [f"{word:08x}" for word in words],
                "rate": rate,
                "precision": precision,
                "threshold": t,
                "digits": digits,
                "shape": shape,
                "broadcast_dims": broadcast_dims,
                "start": start,
                "global_shape": whole,
                "mask": np.packbits(mask.reshape(-1)).tobytes().hex(),
            }
        )
    lines = ",\n    ".join(json.dumps(vector) for vector in vectors)
    path = pathlib.Path(__file__).parent / "data" / "golden_masks.json"
    path.write_text(
        '{\n  "law_version": 1,\n'
        '  "format": "mask: hex of the bits in row-major order, 1 = kept, the first element in the '
        'highest bit of the first byte, zeros at the end",\n'
        f'  "vectors": [\n    {lines}\n  ]\n}}\n'
    )


if __name__ == "__main__":
    main()
