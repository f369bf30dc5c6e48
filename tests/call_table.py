"""A valid call of everything public, as lines of Python, for calls.py."""

KEY = "jax.random.key(0)"
SHORT = {
    "KEY": KEY,
    "X": "np.ones((2, 4, 6), np.float32)",
    "HEADS": "np.ones((2, 4, 1, 6), np.float32)",
    "LOGITS": "np.ones((3, 4, 6), np.float32)",
    "IDS": "np.ones((2, 4), np.int32)",
    "DROP": "lambda key, x: jdropout.dropout(key, x, 0.5)",
    "SAME": "lambda x, *args: x",
    "REPORT": "testing.check_determinism(SAME, np.ones(3, np.float32))",
    "RECORDING": "testing.record(jnp.sin, np.ones(3, np.float32))",
    "MODEL": "nnx.Sequential(jdropout.nnx.Dropout(0.5, rngs=nnx.Rngs(0)))",
    "DENSE": "{'kernel': np.ones((6, 6), np.float32), 'bias': np.ones(6, np.float32)}",
    "LINEAR": "nnx.Linear(6, 6, rngs=nnx.Rngs(0))",
    "EMBED": "nnx.Embed(7, 6, rngs=nnx.Rngs(0))",
    "CELL": "nnx.SimpleCell(6, 6, rngs=nnx.Rngs(0))",
    "STACK": "nnx.split_rngs(splits=3)(nnx.vmap(lambda rngs: nnx.Linear(6, 6, rngs=rngs)))("
    "nnx.Rngs(0))",
}
"""Written out in a call."""

_OF_LOGITS = "logits=LOGITS"
BASE = {
    "jdropout.alpha_dropout": "key=KEY, x=X, rate=0.5",
    "jdropout.audit": "SAME, X",
    "jdropout.AuditReport": None,
    "jdropout.AuditFinding": None,
    "jdropout.AuditedSite": None,
    "jdropout.MCPrediction": None,
    "jdropout.bias_dropout_add": "key=KEY, x=X, bias=None, residual=X, rate=0.5",
    "jdropout.concrete_dropout": "key=KEY, x=X, logit=np.float32(0)",
    "jdropout.concrete_regularizer": "logit=np.float32(0), weight_sum_of_squares=1.0, num_inputs=6",
    "jdropout.dot_product_attention": "query=HEADS, key=HEADS, value=HEADS, dropout_key=KEY, "
    "dropout_rate=0.5",
    "jdropout.drop_block": "key=KEY, x=X, rate=0.5, block_size=2, spatial_axes=(1,)",
    "jdropout.drop_block_gamma": "rate=0.5, map_shape=(4,), block_size=2",
    "jdropout.drop_connect": "key=KEY, w=X, rate=0.5",
    "jdropout.drop_connect_tree": "key=KEY, params={'a': {'w': X}}, rate=0.5, select=['w']",
    "jdropout.drop_path": "key=KEY, x=X, rate=0.5",
    "jdropout.drop_path_rates": "rate=0.5, depth=3",
    "jdropout.dropout": "key=KEY, x=X, rate=0.5",
    "jdropout.dropout_add_norm": "key=KEY, x=X, residual=X, rate=0.5",
    "jdropout.effective_rate": "rate=0.5",
    "jdropout.embedding_dropout": "key=KEY, table=np.ones((7, 6), np.float32), rate=0.5",
    "jdropout.feature_alpha_dropout": "key=KEY, x=X, rate=0.5",
    "jdropout.gaussian_dropout": "key=KEY, x=X, rate=0.5",
    "jdropout.gaussian_noise": "key=KEY, x=X, stddev=0.5",
    "jdropout.keep_indices": "key=KEY, rate=0.5, size=6",
    "jdropout.keep_mask": "key=KEY, rate=0.5, shape=(2, 4)",
    "jdropout.layer_drop": "key=KEY, layer=SAME, x=X, rate=0.5",
    "jdropout.layer_subset": "key=KEY, layer=lambda w, x: x, stacked_params=np.ones(3, np.float32),"
    " x=X, rate=0.5",
    "jdropout.locked_dropout": "key=KEY, x=X, rate=0.5",
    "jdropout.mc_predict": "DROP, KEY, X, num_samples=2",
    "jdropout.multi_sample": "fn=DROP, key=KEY, x=X, num_samples=2",
    "jdropout.patch_dropout": "key=KEY, x=X, rate=0.5",
    "jdropout.r_drop_loss": "logits_a=X, logits_b=X",
    "jdropout.route_tokens": "key=KEY, layers=SAME, x=X, rate=0.5",
    "jdropout.spatial_dropout": "key=KEY, x=X, rate=0.5",
    "jdropout.standout": "key=KEY, x=X, preactivation=X",
    "jdropout.stochastic_depth": "key=KEY, branch=SAME, x=X, rate=0.5",
    "jdropout.targeted_dropout": "key=KEY, w=X, rate=0.5, target_fraction=0.5",
    "jdropout.uniform_noise": "key=KEY, x=X, amplitude=0.5",
    "jdropout.unit_subset": "key=KEY, block=lambda w, v, x: x @ w @ v, incoming=np.ones((6, 4), "
    "np.float32), outgoing=np.ones((4, 6), np.float32), x=X, rate=0.5",
    "jdropout.variational_dense": "key=KEY, x=X, weight=np.ones((6, 3), np.float32), "
    "log_alpha=np.ones((6, 3), np.float32)",
    "jdropout.variational_dropout": "key=KEY, x=X, log_alpha=np.float32(0)",
    "jdropout.variational_kl": "log_alpha=X",
    "jdropout.variational_log_alpha": "weight=X, log_variance=X",
    "jdropout.word_dropout": "key=KEY, tokens=IDS, rate=0.5, replacement=3",
    "jdropout.zoneout": "key=KEY, old=X, new=X, rate=0.5",
    "jdropout.by_position.PositionFunction": "lambda q, k: q - k",
    "jdropout.by_position.alibi": "slopes=4",
    "jdropout.by_position.alibi_slopes": "num_heads=4",
    "jdropout.by_position.document": "segment_ids=IDS",
    "jdropout.by_position.prefix_lm": "prefix_length=2",
    "jdropout.by_position.relative_bias": "table=np.ones((32, 4), np.float32)",
    "jdropout.by_position.sliding_window": "before=2",
    "jdropout.keys.at_site": "key=KEY, site='a'",
    "jdropout.keys.in_batch": "key=KEY, first=0, size=2",
    "jdropout.keys.site_key": "root=KEY, step=1, site='a'",
    "jdropout.keys.step_key": "root=KEY, step=1",
    "jdropout.keys.stratified_key": "key=KEY, sample=0, size=3",
    "jdropout.schedules.buckets": "schedule=schedules.linear(0.0, 0.5, 9), rates=[0.1, 0.5]",
    "jdropout.schedules.constant": "rate=0.5",
    "jdropout.schedules.cosine": "start_rate=0.0, end_rate=0.5, num_steps=9",
    "jdropout.schedules.curriculum": "rate=0.5, gamma=0.1",
    "jdropout.schedules.early": "rate=0.5, cutoff_step=3",
    "jdropout.schedules.join": "schedules=[schedules.constant(0.1), schedules.constant(0.2)], "
    "boundaries=[3]",
    "jdropout.schedules.late": "rate=0.5, cutoff_step=3",
    "jdropout.schedules.linear": "start_rate=0.0, end_rate=0.5, num_steps=9",
    "jdropout.schedules.piecewise": "rates=[0.1, 0.2], boundaries=[3]",
    "jdropout.schedules.warmup": "rate=0.5, num_steps=9",
    "jdropout.uncertainty.entropy": _OF_LOGITS,
    "jdropout.uncertainty.expected_calibration_error": "logits=np.ones((4, 6), np.float32), "
    "labels=np.ones(4, np.int32)",
    "jdropout.uncertainty.expected_entropy": _OF_LOGITS,
    "jdropout.uncertainty.gaussian_log_likelihood": "samples=LOGITS, y=np.ones((4, 6), np.float32),"
    " precision=1.0",
    "jdropout.uncertainty.gaussian_nll": "mean=X, variance=X, y=X",
    "jdropout.uncertainty.log_mean_probabilities": _OF_LOGITS,
    "jdropout.uncertainty.model_precision": "rate=0.5, length_scale=1.0, weight_decay=1e-4, "
    "num_examples=9",
    "jdropout.uncertainty.mutual_information": _OF_LOGITS,
    "jdropout.uncertainty.predictive_entropy": _OF_LOGITS,
    "jdropout.uncertainty.predictive_log_likelihood": f"{_OF_LOGITS}, labels=np.ones(4, np.int32)",
    "jdropout.uncertainty.variation_ratio": _OF_LOGITS,
    "jdropout.testing.DeterminismReport": None,
    "jdropout.testing.DeterminismFinding": None,
    "jdropout.testing.DeterminismPlace": None,
    "jdropout.testing.Difference": None,
    "jdropout.testing.Recording": None,
    "jdropout.testing.assert_backward_uses_forward_mask": "x=X, fn=lambda x: "
    "jdropout.dropout(KEY, x, 0.5)",
    "jdropout.testing.assert_reproducible": "train=lambda: X",
    "jdropout.testing.assert_sharding_invariant": "SAME, X",
    "jdropout.testing.assert_unbiased": "fn=DROP, x=np.ones(6, np.float32), key=KEY, rate=0.5, "
    "tolerance=0.5",
    "jdropout.testing.check_determinism": "SAME, X",
    "jdropout.testing.first_difference": "a=RECORDING, b=RECORDING",
    "jdropout.testing.mask_fingerprint": "key=KEY, rate=0.5, shape=(2, 4)",
    "jdropout.testing.record": "SAME, X",
    "jdropout.testing.record_training": "step=lambda w, x: w, state=np.float32(1), batches=[X]",
    "jdropout.nnx.dot_product_attention": "query=HEADS, key=HEADS, value=HEADS, dropout_rng=KEY, "
    "dropout_rate=0.5",
    "jdropout.nnx.install": None,
    "jdropout.nnx.uninstall": None,
    "jdropout.nnx.replacing": None,
    "jdropout.nnx.mc_predict": "model=MODEL, x=X, key=KEY, num_samples=2",
    "jdropout.nnx.replace_dropout": "model=MODEL",
    "jdropout.nnx.set_rate": "MODEL, 0.3",
    "jdropout.nnx.set_site_keys": "model=MODEL, root=KEY, step=1",
    "jdropout.linen.dot_product_attention": "query=HEADS, key=HEADS, value=HEADS, dropout_rng=KEY, "
    "dropout_rate=0.5",
    "jdropout.linen.install": None,
    "jdropout.linen.uninstall": None,
    "jdropout.linen.replacing": None,
    "jdropout.linen.mc_predict": "model=jdropout.linen.Dropout(0.5), variables={}, x=X, key=KEY, "
    "num_samples=2",
    "jdropout.linen.with_site_keys": "root=KEY, step=1, "
    "apply=jdropout.linen.Dropout(0.5, deterministic=False).apply",
}
"""A valid call of every public function; None for what takes no argument of a caller's."""

_RATE, _INPUTS = "rate=0.5", {"__call__": "inputs=X"}
AFTER = {"jdropout.schedules": "(3)", "jdropout.linen.with_site_keys": f"({{}}, {SHORT['X']})"}
"""How a function that is returned is called."""
LAYERS = {
    "AlphaDropout": (_RATE, _INPUTS),
    "ConcreteDropout": (
        "initial_rate=0.1",
        _INPUTS | {"regularizer": "weight_sum_of_squares=1.0, num_inputs=6"},
    ),
    "DropBlock": ("rate=0.5, block_size=2, spatial_axes=(1,)", _INPUTS),
    "DropConnect": ("module=LINEAR, rate=0.5", {"__call__": "X"}),
    "DropPath": (_RATE, _INPUTS),
    "Dropout": (_RATE, _INPUTS),
    "EmbeddingDropout": ("embed=EMBED, rate=0.5", {"__call__": "inputs=IDS", "attend": "query=X"}),
    "FeatureAlphaDropout": (_RATE, _INPUTS),
    "GaussianDropout": (_RATE, _INPUTS),
    "GaussianNoise": ("stddev=0.5", _INPUTS),
    "LayerDrop": ("layer=LINEAR, rate=0.5", _INPUTS),
    "LayerSubset": ("layer=STACK, rate=0.5", _INPUTS),
    "LockedDropout": (_RATE, _INPUTS),
    "MultiHeadAttention": ("num_heads=1", {"__call__": "X", "attention_fn": None}),
    "MultiHeadDotProductAttention": ("num_heads=1", {"__call__": "X", "attention_fn": None}),
    "MultiSample": ("layer=jdropout.nnx.Dropout(0.5, rngs=nnx.Rngs(0)), num_samples=2", _INPUTS),
    "PatchDropout": (_RATE, _INPUTS),
    "RouteTokens": ("layer=LINEAR, rate=0.5", _INPUTS),
    "SelfAttention": ("num_heads=1", {"__call__": "X", "attention_fn": None}),
    "SpatialDropout": (_RATE, _INPUTS),
    "StochasticDepth": ("layer=LINEAR, rate=0.5", _INPUTS),
    "UnitSubset": (
        "layer=nnx.Sequential(LINEAR, LINEAR), rate=0.5, incoming=['layers/0'], "
        "outgoing=['layers/1']",
        _INPUTS,
    ),
    "VariationalDense": (
        "in_features=6, out_features=3, rngs=nnx.Rngs(0)",
        _INPUTS | {"kl": None},
    ),
    "Zoneout": (
        "cell=CELL, rate=0.5",
        {"__call__": "carry=np.ones((2, 6), np.float32), inputs=np.ones((2, 6), np.float32)"}
        | {"initialize_carry": None},
    ),
}
"""The constructor's arguments and those of the methods, for nnx; None for arguments of Flax's."""

OF_LINEN = {
    "nnx.Sequential(LINEAR, LINEAR)": "linen.Sequential([linen.Dense(6), linen.Dense(6)])",
    "LINEAR": "linen.Dense(6)",
    "EMBED": "linen.Embed(7, 6)",
    "CELL": "linen.SimpleCell(6)",
    "STACK": "linen.Dense(6), num_layers=3",
    "layers/": "layers_",
    "nnx.Dropout(0.5, rngs=nnx.Rngs(0))": "linen.Dropout(0.5, deterministic=False)",
    "in_features=6, out_features=3, rngs=nnx.Rngs(0)": "features=3",
}
"""What stands in linen in place of nnx."""

VARIABLES = {
    "ConcreteDropout": "{'logit': np.float32(0)}",
    "DropConnect": "{'module': DENSE}",
    "EmbeddingDropout": "{'embed': {'embedding': np.ones((7, 6), np.float32)}}",
    "LayerDrop": "{'layer': DENSE}",
    "LayerSubset": "{'layer': {'kernel': np.ones((3, 6, 6), np.float32), 'bias': "
    "np.ones((3, 6), np.float32)}}",
    "RouteTokens": "{'layer': DENSE}",
    "StochasticDepth": "{'layer': DENSE}",
    "UnitSubset": "{'layer': {'layers_0': DENSE, 'layers_1': DENSE}}",
    "VariationalDense": "{'kernel': np.ones((6, 3), np.float32), 'bias': np.ones(3, np.float32), "
    "'log_alpha': np.ones((6, 3), np.float32)}",
    "Zoneout": "{'cell': {'i': DENSE, 'h': {'kernel': np.ones((6, 6), np.float32)}}}",
}
"""The parameters of linen's layers."""

METHODS = {
    "jdropout.AuditReport": ("jdropout.audit(SAME, X)", {"assert_clean": "", "to_dict": None}),
    "jdropout.testing.DeterminismReport": ("REPORT", {"assert_clean": "", "to_dict": None}),
    "jdropout.by_position.PositionFunction": ("", {"tree_flatten": None}),
    "jdropout.testing.Recording": ("RECORDING", {"save": "path='/dev/null'"}),
    "jdropout.equinox.Dropout": (
        "jdropout.equinox.Dropout(p=0.5)",
        {"__call__": "x=X, key=KEY"},
    ),
    "jdropout.schedules.early": ("schedules.early(0.5, 3)", {"__call__": "step=2"}),
}
"""An object and its methods."""
