"""llama.cpp as a peer: a Qwen3 or Qwen3-MoE of transformers written as GGUF, read back and run greedily.

    pip install llama-cpp-python gguf        # its wheel is a source: it compiles for this CPU, for 5 to 30 minutes

Its own best settings that we know of: flash attention, one stream of the cache a sequence, keys and values in f16 beside
bf16 weights. A vocabulary isn't needed, because tokens go in and come out as numbers.
"""

from __future__ import annotations

import ctypes
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MATRICES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
}  # fmt: skip
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def present(peers: str) -> str:
    """The peers that were asked for, without llama.cpp where it can't be had; it says why."""
    absent = [name for name in ("llama_cpp", "gguf") if find_spec(name) is None]
    if "llama.cpp" not in peers or not absent:
        return peers
    print(f"llama.cpp is left out: {' and '.join(absent)} can't be imported.")
    return peers.replace("llama.cpp", "")


def _tensors(theirs: Any) -> dict[str, Tensor]:
    """All weights under GGUF's names; experts [E,F,D] and [E,D,F]."""
    found = {}
    for name, weight in theirs.state_dict().items():
        part = name.removesuffix(".weight")
        if part in OUTSIDE:
            found[OUTSIDE[part] + ".weight"] = weight
            continue
        _, _, layer, inner = part.split(".", 3)
        if inner == "mlp.experts.gate_up_proj":  # [E,2F,D]
            gate, up = weight.chunk(2, 1)
            found |= {f"blk.{layer}.ffn_gate_exps.weight": gate, f"blk.{layer}.ffn_up_exps.weight": up}
        elif inner == "mlp.experts.down_proj":
            found[f"blk.{layer}.ffn_down_exps.weight"] = weight
        else:
            found[f"blk.{layer}.{MATRICES[inner]}.weight"] = weight
    if theirs.config.tie_word_embeddings:
        found.pop("output.weight", None)
    return found


def write_gguf(theirs: Any, path: Path) -> None:
    import gguf

    c, moe = theirs.config, theirs.config.model_type == "qwen3_moe"
    writer = gguf.GGUFWriter(path, "qwen3moe" if moe else "qwen3")
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(c.vocab_size)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    if moe:
        writer.add_expert_count(c.num_experts)
        writer.add_expert_used_count(c.num_experts_per_tok)
        writer.add_expert_feed_forward_length(c.moe_intermediate_size)
    for name, weight in _tensors(theirs).items():
        weight = weight.detach().contiguous()
        if weight.ndim == 1 or "ffn_gate_inp" in name or weight.dtype == torch.float32:
            writer.add_tensor(name, weight.float().numpy())
        else:
            data = weight.view(torch.uint8).numpy()  # numpy has no bf16
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Llama:
    """A model with a context for `batch` sequences of `slots` tokens."""

    def __init__(self, theirs: Any, batch: int, slots: int, threads: int) -> None:
        import llama_cpp

        self.api, self.vocab = llama_cpp, theirs.config.vocab_size
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            write_gguf(theirs, path)
            how = llama_cpp.llama_model_default_params()
            how.use_mmap = False
            self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), how)
        self.slots = -(-slots // 256) * 256
        p = llama_cpp.llama_context_default_params()
        p.n_ctx, p.n_batch, p.n_ubatch, p.n_seq_max = batch * self.slots, batch * self.slots, 512, batch
        p.n_threads = p.n_threads_batch = threads
        p.flash_attn_type, p.kv_unified, p.no_perf = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED, False, True
        p.type_k = p.type_v = 0 if theirs.dtype == torch.float32 else llama_cpp.GGML_TYPE_F16  # 0: f32
        self.context = llama_cpp.llama_init_from_model(self.model, p)
        if not self.context:
            raise SystemExit("llama.cpp can't make a context for this model.")
        self.batch = llama_cpp.llama_batch_init(batch * self.slots, 0, 1)

    def close(self) -> None:
        self.api.llama_batch_free(self.batch)
        self.api.llama_free(self.context)
        self.api.llama_model_free(self.model)

    def generate(self, prompt: Tensor, new: int) -> Tensor:
        """Greedy: prefill, then one token a row and step. -> [B, prompt+new]"""
        rows, length = prompt.shape
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        out = torch.cat((prompt, prompt.new_empty(rows, new)), 1)
        tokens = self._decode(prompt, 0)
        for at in range(length, length + new):
            out[:, at] = tokens
            if at + 1 < length + new:
                tokens = self._decode(out[:, at : at + 1], at)
        return out

    def _decode(self, tokens: Tensor, start: int) -> Tensor:
        """tokens [B,T] at positions from `start` on -> the likeliest next one of each row [B]."""
        rows, length = tokens.shape
        b, last = self.batch, []
        b.n_tokens = rows * length
        for i, token in enumerate(tokens.flatten().tolist()):
            row, at = divmod(i, length)
            b.token[i], b.pos[i], b.n_seq_id[i], b.seq_id[i][0] = token, start + at, 1, row
            b.logits[i] = at == length - 1
            if at == length - 1:
                last.append(i)
        if self.api.llama_decode(self.context, b) != 0:
            raise SystemExit("llama.cpp failed to decode a batch.")
        size = self.vocab * ctypes.sizeof(ctypes.c_float)
        rows_ = [ctypes.cast(self.api.llama_get_logits_ith(self.context, i), ctypes.c_void_p).value for i in last]
        logits = [torch.frombuffer((ctypes.c_char * size).from_address(at), dtype=torch.float32) for at in rows_]
        return torch.stack(logits).argmax(-1)
