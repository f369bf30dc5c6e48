"""Dropout for JAX: nothing stored, the same bits everywhere, close to the speed of a copy."""

from jdropout._alpha import alpha_dropout as alpha_dropout
from jdropout._alpha import feature_alpha_dropout as feature_alpha_dropout
from jdropout._attention import dot_product_attention as dot_product_attention
from jdropout._audit import audit as audit
from jdropout._audit.report import AuditedSite as AuditedSite
from jdropout._audit.report import AuditFinding as AuditFinding
from jdropout._audit.report import AuditReport as AuditReport
from jdropout._concrete import concrete_dropout as concrete_dropout
from jdropout._concrete import concrete_regularizer as concrete_regularizer
from jdropout._drop_block import drop_block as drop_block
from jdropout._drop_block import drop_block_gamma as drop_block_gamma
from jdropout._drop_connect import drop_connect as drop_connect
from jdropout._drop_connect import drop_connect_tree as drop_connect_tree
from jdropout._dropout import dropout as dropout
from jdropout._dropout import effective_rate as effective_rate
from jdropout._dropout import keep_mask as keep_mask
from jdropout._layer_drop import layer_drop as layer_drop
from jdropout._monte_carlo import MCPrediction as MCPrediction
from jdropout._monte_carlo import mc_predict as mc_predict
from jdropout._multi_sample import multi_sample as multi_sample
from jdropout._noise import gaussian_dropout as gaussian_dropout
from jdropout._noise import gaussian_noise as gaussian_noise
from jdropout._noise import uniform_noise as uniform_noise
from jdropout._r_drop import r_drop_loss as r_drop_loss
from jdropout._residual import bias_dropout_add as bias_dropout_add
from jdropout._residual import dropout_add_norm as dropout_add_norm
from jdropout._shared import drop_path as drop_path
from jdropout._shared import drop_path_rates as drop_path_rates
from jdropout._shared import embedding_dropout as embedding_dropout
from jdropout._shared import locked_dropout as locked_dropout
from jdropout._shared import spatial_dropout as spatial_dropout
from jdropout._standout import standout as standout
from jdropout._subset import keep_indices as keep_indices
from jdropout._subset import layer_subset as layer_subset
from jdropout._subset import route_tokens as route_tokens
from jdropout._subset import stochastic_depth as stochastic_depth
from jdropout._subset import unit_subset as unit_subset
from jdropout._targeted import targeted_dropout as targeted_dropout
from jdropout._tokens import patch_dropout as patch_dropout
from jdropout._tokens import word_dropout as word_dropout
from jdropout._variational import variational_dense as variational_dense
from jdropout._variational import variational_dropout as variational_dropout
from jdropout._variational import variational_kl as variational_kl
from jdropout._variational import variational_log_alpha as variational_log_alpha
from jdropout._zoneout import zoneout as zoneout

__all__ = [
    "AuditFinding",
    "AuditReport",
    "AuditedSite",
    "MCPrediction",
    "alpha_dropout",
    "audit",
    "bias_dropout_add",
    "concrete_dropout",
    "concrete_regularizer",
    "dot_product_attention",
    "drop_block",
    "drop_block_gamma",
    "drop_connect",
    "drop_connect_tree",
    "drop_path",
    "drop_path_rates",
    "dropout",
    "dropout_add_norm",
    "effective_rate",
    "embedding_dropout",
    "feature_alpha_dropout",
    "gaussian_dropout",
    "gaussian_noise",
    "keep_indices",
    "keep_mask",
    "layer_drop",
    "layer_subset",
    "locked_dropout",
    "mc_predict",
    "multi_sample",
    "patch_dropout",
    "r_drop_loss",
    "route_tokens",
    "spatial_dropout",
    "standout",
    "stochastic_depth",
    "targeted_dropout",
    "uniform_noise",
    "unit_subset",
    "variational_dense",
    "variational_dropout",
    "variational_kl",
    "variational_log_alpha",
    "word_dropout",
    "zoneout",
]
__version__ = "0.2.0"
