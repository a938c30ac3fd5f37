"""A spec made of tensors: mixers, ffns, residual styles, caches."""

from trivet.model.cache import LayerCache
from trivet.model.ffn import Routing
from trivet.model.io import load_model, load_spec, save_model
from trivet.model.transformer import Transformer

__all__ = ["LayerCache", "Routing", "Transformer", "load_model", "load_spec", "save_model"]
