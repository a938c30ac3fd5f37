"""A trained model's context made longer at load time, without training: YaRN, or dual chunks. No weight changes.

Both take the model's context L as the length that it was trained at. They can be joined, YaRN first:
chunks of a model that YaRN has taken to 2 L are then twice as long.
"""

from __future__ import annotations

from collections.abc import Callable

from trivet.config import UserError
from trivet.spec.mixers import GQA, MLA, Mixer
from trivet.spec.model import ModelSpec
from trivet.spec.positions import DualChunks, Yarn


def with_yarn(spec: ModelSpec, factor: float) -> tuple[ModelSpec, str]:
    """The spec with YaRN (arXiv 2309.00071) by `factor` in every layer with rotary positions over all of the context,
    and a sentence for the user. A model that has YaRN already gets the new factor over the same original length.

    Raises UserError where no layer can be extended so.
    """
    if factor <= 1:
        raise UserError(f"YaRN stretches a context by a factor above 1, got {factor:g}.")
    length = spec.context_length

    def extended(mixer: Mixer) -> Mixer | None:
        nonlocal length
        if not isinstance(mixer, GQA | MLA) or mixer.rope.dims == 0:
            return None
        rope = mixer.rope
        if isinstance(mixer, GQA):
            if mixer.window is not None:
                return None
            if mixer.chunks is not None:
                raise UserError(
                    "This model has dual chunks, which bound its positions already: YaRN has nothing to stretch."
                )
        if rope.llama3 is not None:
            raise UserError(
                "This model's context is extended by Llama 3's rule already; YaRN on top of it is not defined."
            )
        if rope.yarn is not None:
            length = rope.yarn.original_length
            yarn = rope.yarn.model_copy(update={"factor": factor})
        else:  # the temperature: on cos and sin (GQA), on all of the logit (MLA, most of which is not rotated)
            yarn = Yarn(factor=factor, original_length=length, mscale_all_dim=1.0 if isinstance(mixer, MLA) else 0.0)
        return mixer.model_copy(update={"rope": rope.model_copy(update={"yarn": yarn})})

    mixers, kept = _each(spec, extended, "YaRN")
    context = round(length * factor)
    said = f"YaRN x{factor:g} takes the context from {length:,} to {context:,} tokens, untrained{kept}"
    return spec.model_copy(update={"mixers": mixers, "context_length": context}), said


def with_chunks(spec: ModelSpec, factor: float) -> tuple[ModelSpec, str]:
    """The spec with dual chunk attention up to `factor` times its context, and a sentence for the user.

    ChunkLlama's proportions: chunk_size 3/4 L, of which L/16 local; YaRN's temperature past L as Qwen2.5-1M, unless
    the model has YaRN's own. Raises UserError where a layer with unbounded positions can't have them.
    """
    if factor <= 1:
        raise UserError(f"Dual chunks stretch a context by a factor above 1, got {factor:g}.")
    length = spec.context_length

    def extended(mixer: Mixer) -> Mixer | None:
        if isinstance(mixer, MLA) and mixer.rope.dims:
            raise UserError("Dual chunks are computed in GQA only, and this model has MLA; use YaRN.")
        if not isinstance(mixer, GQA) or mixer.rope.dims == 0 or mixer.window is not None:
            return None
        if mixer.chunks is not None:
            raise UserError("This model has dual chunks already.")
        chunks = DualChunks(
            chunk_size=max(2, length * 3 // 4), local_size=length // 16,
            original_length=length if mixer.rope.yarn is None else None,
        )  # fmt: skip
        return mixer.model_copy(update={"chunks": chunks})

    mixers, kept = _each(spec, extended, "Dual chunks")
    context = round(length * factor)
    said = f"Dual chunks take the context from {length:,} to {context:,} tokens, untrained{kept}"
    return spec.model_copy(update={"mixers": mixers, "context_length": context}), said


def _each(spec: ModelSpec, extend: Callable[[Mixer], Mixer | None], what: str) -> tuple[dict[str, Mixer], str]:
    """Every mixer that the model uses extended, and words for those that stay."""
    used = {layer.mixer for layer in spec.layers}
    done = {name: extend(mixer) for name, mixer in spec.mixers.items() if mixer in used}
    if not any(done.values()):
        raise UserError(f"{what} can't extend this model: no layer has rotary positions over all of its context.")
    stay = [name for name, mixer in done.items() if mixer is None]
    kept = f"; {', '.join(stay)} layers stay as they are" if stay else ""
    return spec.mixers | {name: mixer for name, mixer in done.items() if mixer is not None}, kept
