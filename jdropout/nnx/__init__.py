"""Dropout as Flax nnx modules."""

try:
    from flax import nnx as _nnx  # noqa: F401  # only to raise its ImportError
except ImportError as _error:
    raise ImportError(
        "jdropout.nnx needs Flax. Install it with: pip install 'jdropout[flax]'"
    ) from _error

from jdropout.nnx._alpha import AlphaDropout as AlphaDropout
from jdropout.nnx._alpha import FeatureAlphaDropout as FeatureAlphaDropout
from jdropout.nnx._attention import MultiHeadAttention as MultiHeadAttention
from jdropout.nnx._attention import dot_product_attention as dot_product_attention
from jdropout.nnx._concrete import ConcreteDropout as ConcreteDropout
from jdropout.nnx._drop_block import DropBlock as DropBlock
from jdropout.nnx._drop_connect import DropConnect as DropConnect
from jdropout.nnx._dropout import Dropout as Dropout
from jdropout.nnx._embedding_dropout import EmbeddingDropout as EmbeddingDropout
from jdropout.nnx._layer_drop import LayerDrop as LayerDrop
from jdropout.nnx._layer_subset import LayerSubset as LayerSubset
from jdropout.nnx._model import set_rate as set_rate
from jdropout.nnx._model import set_site_keys as set_site_keys
from jdropout.nnx._monte_carlo import mc_predict as mc_predict
from jdropout.nnx._multi_sample import MultiSample as MultiSample
from jdropout.nnx._noise import GaussianDropout as GaussianDropout
from jdropout.nnx._noise import GaussianNoise as GaussianNoise
from jdropout.nnx._replace import install as install
from jdropout.nnx._replace import replace_dropout as replace_dropout
from jdropout.nnx._replace import replacing as replacing
from jdropout.nnx._replace import uninstall as uninstall
from jdropout.nnx._route_tokens import RouteTokens as RouteTokens
from jdropout.nnx._shared import DropPath as DropPath
from jdropout.nnx._shared import LockedDropout as LockedDropout
from jdropout.nnx._shared import SpatialDropout as SpatialDropout
from jdropout.nnx._stochastic_depth import StochasticDepth as StochasticDepth
from jdropout.nnx._tokens import PatchDropout as PatchDropout
from jdropout.nnx._unit_subset import UnitSubset as UnitSubset
from jdropout.nnx._variational import VariationalDense as VariationalDense
from jdropout.nnx._zoneout import Zoneout as Zoneout

__all__ = [
    "AlphaDropout",
    "ConcreteDropout",
    "DropBlock",
    "DropConnect",
    "DropPath",
    "Dropout",
    "EmbeddingDropout",
    "FeatureAlphaDropout",
    "GaussianDropout",
    "GaussianNoise",
    "LayerDrop",
    "LayerSubset",
    "LockedDropout",
    "MultiHeadAttention",
    "MultiSample",
    "PatchDropout",
    "RouteTokens",
    "SpatialDropout",
    "StochasticDepth",
    "UnitSubset",
    "VariationalDense",
    "Zoneout",
    "dot_product_attention",
    "install",
    "mc_predict",
    "replace_dropout",
    "replacing",
    "set_rate",
    "set_site_keys",
    "uninstall",
]
