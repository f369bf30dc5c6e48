"""Dropout of subsets of exact size, which saves the work of what it drops."""

from jdropout._subset._indices import keep_indices as keep_indices
from jdropout._subset._layer_subset import layer_subset as layer_subset
from jdropout._subset._route_tokens import route_tokens as route_tokens
from jdropout._subset._stochastic_depth import stochastic_depth as stochastic_depth
from jdropout._subset._unit_subset import unit_subset as unit_subset
