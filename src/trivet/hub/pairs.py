"""Latent attention whose rotation turns halves (i, i + dims/2), rewritten to turn neighbours (2i, 2i + 1).

DeepSeek's checkpoints turn neighbours. transformers reads `rope_interleave = false`, vLLM does not look at it
and would compute something else; so a model of ours is exported in the form that everyone means. Query and
key rows are put in the order 0, dims/2, 1, dims/2 + 1, ...: both sides of every dot product alike, and all
outputs are what they were.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trivet.model import Transformer
from trivet.spec import MLA, ModelSpec


def spec_in_pairs(spec: ModelSpec) -> ModelSpec:
    mixers = {
        name: mixer.model_copy(update={"rope": mixer.rope.model_copy(update={"interleaved": True})})
        if isinstance(mixer, MLA)
        else mixer
        for name, mixer in spec.mixers.items()
    }
    return spec.model_copy(update={"mixers": mixers})


@torch.no_grad()
def in_pairs(model: Transformer) -> Transformer:
    """The same function with `spec_in_pairs`; tensors that need no change are shared."""
    spec, state = spec_in_pairs(model.spec), model.state_dict()
    if spec == model.spec:
        return model
    layers = dict(zip((f"layers.{i}.mixer." for i in range(len(spec.layers))), model.spec.layers, strict=True))
    layers |= {f"mtp.{k}.layer.mixer.": model.spec.layers[-1] for k in range(spec.mtp)}
    for name, layer in layers.items():
        mixer = layer.mixer
        if isinstance(mixer, MLA) and not mixer.rope.interleaved:
            query = name + ("q_proj.0.weight" if mixer.q_rank is None else "q_proj.2.weight")
            state[query] = _reordered(state[query], mixer.heads, mixer.rope.dims)
            state[name + "kv_down.weight"] = _reordered(state[name + "kv_down.weight"], 1, mixer.rope.dims)
    with torch.device("meta"):
        made = Transformer(spec, seed=None)
    made.load_state_dict(state, assign=True)
    return made


def _reordered(weight: Tensor, heads: int, dims: int) -> Tensor:
    """[heads * (rest + dims), D]: the last `dims` rows of each head from halves to pairs."""
    rest, turned = weight.unflatten(0, (heads, -1)).split((len(weight) // heads - dims, dims), 1)
    pairs = turned.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)  # [heads,2,dims/2,D] -> [heads,dims,D]
    return torch.cat((rest, pairs), 1).flatten(0, 1)
