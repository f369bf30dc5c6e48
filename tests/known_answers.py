"""The known answers, as questions to a port: in the order in which docs/law.md asks them."""

import json
import pathlib

import numpy as np

DATA = pathlib.Path(__file__).parent / "data"


def vectors(name):
    return json.loads((DATA / name).read_text())["vectors"]


def words(texts):
    return tuple(int(text, 16) for text in texts)


def cipher(port):
    for vector in vectors("threefry2x32.json"):
        if vector["rounds"] == 20:
            output = port.threefry2x32(words(vector["key"]), words(vector["counter"]))
            assert tuple(output) == words(vector["output"])


def mask_keys(port):
    for vector in vectors("golden_masks.json"):
        key = words(vector["key_words"])
        for digit, expected in enumerate(vector["mask_keys"]):
            assert port.mask_key(key, digit) == words(expected), vector["checks"]


def thresholds(port):
    for vector in vectors("golden_thresholds.json") + vectors("golden_masks.json"):
        answer = vector["threshold"], vector["digits"]
        assert port.threshold(vector["rate"], vector["precision"]) == answer, vector["checks"]


def numbers(port):
    for vector in vectors("golden_masks.json"):
        options = {name: vector[name] for name in ("broadcast_dims", "start", "global_shape")}
        key = words(vector["key_words"])
        drawn = port.uniform_numbers(key, vector["digits"], vector["shape"], **options)
        first = np.broadcast_to(np.asarray(drawn), vector["shape"]).reshape(-1)[:8].tolist()
        assert first == vector["first_numbers"], vector["checks"]


def masks(port):
    names = ("broadcast_dims", "start", "global_shape", "precision")
    for vector in vectors("golden_masks.json"):
        options = {name: vector[name] for name in names}
        key = words(vector["key_words"])
        mask = np.asarray(port.keep_mask(key, vector["rate"], vector["shape"], **options))
        assert mask.shape == tuple(vector["shape"])
        assert np.packbits(mask.reshape(-1)).tobytes().hex() == vector["mask"], vector["checks"]


def keys(port):
    for vector in vectors("golden_keys.json"):
        root, step = words(vector["root_words"]), int(vector["step"], 16)
        key = port.site_key(root, step=step, site=vector["site"], microbatch=vector["microbatch"])
        assert key == words(vector["key_words"]), vector


def subsets(port):
    for vector in vectors("golden_subsets.json"):
        options = {name: vector[name] for name in ("groups", "shape", "start", "global_shape")}
        key = words(vector["key_words"])
        indices = port.keep_indices(key, vector["rate"], vector["size"], **options)
        assert np.asarray(indices).tolist() == vector["indices"], vector["checks"]


def strata(port):
    for vector in vectors("golden_strata.json"):
        options = {name: vector[name] for name in ("start", "global_shape", "precision")}
        key, sample = words(vector["key_words"]), (vector["sample"], vector["size"])
        mask = port.keep_mask(key, vector["rate"], vector["shape"], sample=sample, **options)
        mask = np.asarray(mask).reshape(-1)
        assert np.packbits(mask).tobytes().hex() == vector["mask"], vector["checks"]


STEPS = [cipher, mask_keys, thresholds, numbers, masks, keys, subsets]
