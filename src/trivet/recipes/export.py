"""`trivet export`: a model, or a part of a checkpoint, in the format of a family that others load.

The config.json is that of a checkpoint of the same shape (`--like`, or the checkpoint itself), changed where
the model differs; or, for a model of our own, the words that a family has for its spec (`hub/write.py`).
Either way it is read back and compared before anything is written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trivet.chat import Chat
from trivet.chat.exported import tokenizer_files
from trivet.config import UserError
from trivet.disk import atomic_dir
from trivet.hub import Described, read_config_file
from trivet.hub.adapter import save_adapter
from trivet.hub.base import base_of, family_of, is_adapter
from trivet.hub.checkpoint import Shards, account_for, is_family, load_any, save_checkpoint
from trivet.hub.pairs import in_pairs, spec_in_pairs
from trivet.hub.part import cut, parse_numbers
from trivet.hub.write import differences, rewrite_config, write_config
from trivet.model import load_spec
from trivet.model.lora import fingerprint, merge
from trivet.spec import ModelSpec

COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "generation_config.json",
)
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
DTYPES = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16}


def export(
    directory: Path, out: Path, like: Path | None = None, family: str | None = None, dtype: str | None = None,
    layers: str | None = None, experts: str | None = None,
) -> None:  # fmt: skip
    """Write a model with its config and tokenizer. Raises UserError where the family has no words for it."""
    if out.exists():
        raise UserError(f"{out} exists already; give another --out or remove it.")
    if like is not None and family is not None:
        raise UserError("--like takes the family from that checkpoint; leave --family out.")
    base = base_of(directory)  # the directory itself where it is no adapter
    kept = None if layers is None else parse_numbers(layers, "--layers")
    chosen = None if experts is None else parse_numbers(experts, "--experts")
    source = like or (base if is_family(base) else None)
    if source is None:
        described = None
        write_config(spec_in_pairs(load_spec(base)), family)  # better known before weights are read
        files, ids = _own_tokenizer(Chat.load(directory if (directory / "tokenizer.json").is_file() else base))
    else:
        described = read_config_file(source / "config.json")
        files, ids = _copied(source), {key: described.config.get(key) for key in IDS}
    model = load_any(directory, "cpu", DTYPES[dtype], kept, chosen)
    merge(model)
    beside = None
    if described is None or family is not None:
        model = in_pairs(model)
        config = write_config(model.spec, family) | ids
    else:
        expected, _ = cut(described.spec, kept, chosen, str(source))
        config = _like(model.spec, expected, described, f"{directory} is no model of {source}'s shape")
        if layers is None and experts is None:
            beside = Shards(source or base)
            account_for(beside, described.spec, described.family)
    for key in ("torch_dtype", "quantization_config"):
        config.pop(key, None)
    config["dtype"] = str(model.embed.dtype).removeprefix("torch.")
    with atomic_dir(out) as aside:
        save_checkpoint(model, aside, config, like=beside)
        for name, content in files.items():
            (aside / name).write_bytes(content)
    depth = len(model.spec.layers)
    print(
        f"Wrote {out}: {config['model_type']}, {depth} layer{'s' * (depth > 1)}, {model.spec.num_params():,} parameters "
        f"in {config['dtype']}{', which was quantized' if _quantized(described) else ''}."
    )


def export_adapter(directory: Path, out: Path, like: Path | None, dtype: str | None, beside: list[str]) -> None:
    """Write an adapter as it is, in PEFT's format, for `like` as its base. Raises UserError where it belongs to another."""
    if out.exists():
        raise UserError(f"{out} exists already; give another --out or remove it.")
    if not is_adapter(directory):
        raise UserError(f"{directory} holds a whole model, no adapter: leave --adapter out.")
    if beside:
        raise UserError(f"{beside[0]} is of a whole model: leave it out, or --adapter.")
    base = like or base_of(directory)
    if not is_family(base):
        raise UserError(f"{base} has no family's format: give --like, the checkpoint that it came from.")
    model = load_any(directory, dtype=DTYPES[dtype] or torch.float32)
    if base.resolve() != base_of(directory).resolve() and fingerprint(load_any(base)) != fingerprint(model):
        raise UserError(
            f"{directory} was trained on other weights than {base} holds, so its adapter is worth nothing there: "
            "leave --adapter out to write the merged model."
        )
    with atomic_dir(out) as aside:
        save_adapter(model, aside, base, family_of(base))


def _like(ours: ModelSpec, theirs: ModelSpec, described: Described, wrong: str) -> dict[str, Any]:
    """The checkpoint's config for this model, which may lack prediction modules but is else of that shape."""
    theirs = theirs.model_copy(update={"mtp": ours.mtp})
    for what in differences(ours, theirs):
        raise UserError(f"{wrong}: {what}.")
    return rewrite_config(dict(described.config), described.spec, theirs)


def _own_tokenizer(chat: Chat) -> tuple[dict[str, bytes], dict[str, int | None]]:
    ids = {"bos_token_id": None, "eos_token_id": chat.end_id, "pad_token_id": chat.tokenizer.token_to_id("<pad>")}
    return {name: text.encode() for name, text in tokenizer_files(chat).items()}, ids


def _copied(source: Path) -> dict[str, bytes]:
    return {name: (source / name).read_bytes() for name in COPIED if (source / name).is_file()}


def _quantized(described: Described | None) -> bool:
    return described is not None and bool(described.config.get("quantization_config"))
