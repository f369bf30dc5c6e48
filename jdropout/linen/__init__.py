"""Dropout as Flax linen modules."""

try:
    from flax import linen as _linen  # noqa: F401  # only to raise its ImportError
except ImportError as _error:
    raise ImportError(
        "jdropout.linen needs Flax. Install it with: pip install 'jdropout[flax]'"
    ) from _error

from jdropout.linen._alpha import AlphaDropout as AlphaDropout
from jdropout.linen._alpha import FeatureAlphaDropout as FeatureAlphaDropout
from jdropout.linen._attention import MultiHeadAttention as MultiHeadAttention
from jdropout.linen._attention import MultiHeadDotProductAttention as MultiHeadDotProductAttention
from jdropout.linen._attention import SelfAttention as SelfAttention
from jdropout.linen._attention import dot_product_attention as dot_product_attention
from jdropout.linen._concrete import ConcreteDropout as ConcreteDropout
from jdropout.linen._drop_block import DropBlock as DropBlock
from jdropout.linen._drop_connect import DropConnect as DropConnect
from jdropout.linen._dropout import Dropout as Dropout
from jdropout.linen._embedding_dropout import EmbeddingDropout as EmbeddingDropout
from jdropout.linen._layer_drop import LayerDrop as LayerDrop
from jdropout.linen._layer_subset import LayerSubset as LayerSubset
from jdropout.linen._model import with_site_keys as with_site_keys
from jdropout.linen._monte_carlo import mc_predict as mc_predict
from jdropout.linen._multi_sample import MultiSample as MultiSample
from jdropout.linen._noise import GaussianDropout as GaussianDropout
from jdropout.linen._noise import GaussianNoise as GaussianNoise
from jdropout.linen._replace import install as install
from jdropout.linen._replace import replacing as replacing
from jdropout.linen._replace import uninstall as uninstall
from jdropout.linen._route_tokens import RouteTokens as RouteTokens
from jdropout.linen._shared import DropPath as DropPath
from jdropout.linen._shared import LockedDropout as LockedDropout
from jdropout.linen._shared import SpatialDropout as SpatialDropout
from jdropout.linen._stochastic_depth import StochasticDepth as StochasticDepth
from jdropout.linen._tokens import PatchDropout as PatchDropout
from jdropout.linen._unit_subset import UnitSubset as UnitSubset
from jdropout.linen._variational import VariationalDense as VariationalDense
from jdropout.linen._zoneout import Zoneout as Zoneout

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
    "MultiHeadDotProductAttention",
    "MultiSample",
    "PatchDropout",
    "RouteTokens",
    "SelfAttention",
    "SpatialDropout",
    "StochasticDepth",
    "UnitSubset",
    "VariationalDense",
    "Zoneout",
    "dot_product_attention",
    "install",
    "mc_predict",
    "replacing",
    "uninstall",
    "with_site_keys",
]
