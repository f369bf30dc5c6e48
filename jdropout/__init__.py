"""Dropout for JAX: nothing stored, the same bits everywhere, close to the speed of a copy."""

from jdropout._attention import dot_product_attention as dot_product_attention
from jdropout._audit import audit as audit
from jdropout._dropout import dropout as dropout
from jdropout._dropout import effective_rate as effective_rate
from jdropout._dropout import keep_mask as keep_mask
from jdropout._fused import bias_dropout_add as bias_dropout_add
from jdropout._fused import dropout_add_norm as dropout_add_norm

__all__ = [
    "audit",
    "bias_dropout_add",
    "dot_product_attention",
    "dropout",
    "dropout_add_norm",
    "effective_rate",
    "keep_mask",
]
__version__ = "0.1.0"
