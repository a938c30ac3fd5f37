"""A checkpoint's config.json, read key by key: what nobody read is refused unless it is known not to change the maths.

A family's reader takes every key it understands with `take` and states with `only` which values of a
switch it computes. `finish` then names what is left over. Silence about an unknown key is how a model
loads and is subtly wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trivet.config import UserError, nearest
from trivet.spec import Llama3Scaling, Rope, Yarn

# Keys that say where a checkpoint comes from, how it was trained or how to sample from it.
HARMLESS = frozenset(
    """
    _attn_implementation _commit_hash _name_or_path architectures attention_dropout attn_implementation auto_map
    aux_loss_alpha bos_token_id chunk_size_feed_forward dtype embd_pdrop eos_token_id ep_size finetuning_task
    hidden_dropout id2label initializer_range is_decoder is_encoder_decoder keys_to_ignore_at_inference label2id
    max_window_layers mlp_dropout model_type output_attentions output_hidden_states output_router_logits
    pad_token_id pretraining_tp problem_type resid_pdrop return_dict router_aux_loss_coef router_jitter_noise
    seq_aux sliding_window_pattern tensor_parallel tokenizer_class torch_dtype transformers_version
    transformers.js_config unsloth_fixed unsloth_version use_cache
    """.split()
)
REQUIRED = object()


class Config:
    """One config.json. `where` names it in errors; `notes` holds what its reader must tell the user."""

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self.data, self.where = data, where
        self.read: set[str] = set()
        self.notes: list[str] = []

    def take(self, key: str, default: Any = REQUIRED) -> Any:
        """The key's value; `default` where it is absent or null. Raises UserError where it is needed and absent."""
        self.read.add(key)
        value = self.data.get(key)
        if value is not None:
            return value
        if default is REQUIRED:
            raise UserError(f"{self.where} has no {key!r}.{nearest(key, self.data.keys() - {key})}")
        return default

    def either(self, key: str, other: str) -> Any:
        """The value of a key that files spell in two ways."""
        found = self.take(key, None)
        return self.take(other, None) or self.take(key) if found is None else found

    def only(self, key: str, *allowed: Any) -> None:
        """Nothing but these values of a switch is computed; absent or null means the first of them."""
        value = self.take(key, allowed[0])
        if value not in allowed:
            said = " or ".join(repr(a) for a in allowed)
            raise UserError(f"{self.where}: {key} = {value!r} would change the maths; only {said} is computed.")

    def quantized(self) -> None:
        """Says it where weights are not stored as they are computed."""
        how = self.take("quantization_config", None)
        if how is not None:
            self.notes.append(f"weights are stored in {how.get('quant_method', 'a quantized form')}")

    def rope(self, dims: int, interleaved: bool = False, part: float | None = None) -> Rope:
        """The rotation, in the words of transformers 5 (`rope_parameters`) or of older files (`rope_scaling`).

        `part`: the family rotates this part of `dims` unless the file names another; None: all, and a part is refused.
        """
        rules = dict(self.take("rope_parameters", None) or self.take("rope_scaling", None) or {})
        for key in ("rope_parameters", "rope_scaling"):
            self.read.add(key)
        theta = rules.pop("rope_theta", None) or self.take("rope_theta", 10000.0)
        self.read.add("rope_theta")
        kind = rules.pop("rope_type", None) or rules.pop("type", None) or "default"
        rules.pop("type", None)
        inner = Config(rules, f"{self.where}: rope_scaling")
        scaling: dict[str, Any] = {}
        if kind == "yarn":
            inner.only("attention_factor", None)
            inner.only("truncate", True)
            mscale, all_dim = inner.take("mscale", 0.0), inner.take("mscale_all_dim", 0.0)
            scaling["yarn"] = Yarn(
                factor=inner.take("factor"), original_length=inner.take("original_max_position_embeddings"),
                beta_fast=inner.take("beta_fast", 32.0), beta_slow=inner.take("beta_slow", 1.0),
                mscale=mscale if mscale and all_dim else 1.0, mscale_all_dim=all_dim if mscale else 0.0,
            )  # fmt: skip
        elif kind == "llama3":
            scaling["llama3"] = Llama3Scaling(
                factor=inner.take("factor"), original_length=inner.take("original_max_position_embeddings"),
                low_freq_factor=inner.take("low_freq_factor"), high_freq_factor=inner.take("high_freq_factor"),
            )  # fmt: skip
        elif kind != "default":
            raise UserError(f"{self.where}: rope type {kind!r} is not computed; there are default, yarn and llama3.")
        if part is None:
            self.only("partial_rotary_factor", 1.0)
            inner.only("partial_rotary_factor", 1.0)
        else:
            turned = dims * inner.take("partial_rotary_factor", self.take("partial_rotary_factor", part))
            dims = int(turned + 1e-6)  # a third of 192 is 64
        inner.finish()
        return Rope(dims=dims, theta=theta, interleaved=interleaved, **scaling)

    def finish(self) -> None:
        """Raises UserError where a key is left over that may change the maths."""
        left = sorted(k for k in self.data if k not in self.read and k not in HARMLESS and self.data[k] is not None)
        if left:
            raise UserError(
                f"{self.where} has keys that may change the maths and are not computed: {', '.join(left)}. "
                "Remove them if you know that they do not."
            )
