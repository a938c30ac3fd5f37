"""Random weights in transformers' Qwen3 and DeepSeek-V3: same logits, same decoding, same gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from test_model_zoo import gap

transformers = pytest.importorskip("transformers")
from peers import gradients, randomise, twin  # noqa: E402

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
        "beta_fast": 4.0, "beta_slow": 1.0}  # fmt: skip
QWEN: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 12, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": True, "max_position_embeddings": 64,
}  # fmt: skip
DEEPSEEK: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 3,
    "num_key_value_heads": 3, "kv_lora_rank": 16, "q_lora_rank": 20, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12,
    "v_head_dim": 10, "first_k_dense_replace": 1, "n_routed_experts": 12, "n_group": 4, "topk_group": 2,
    "num_experts_per_tok": 4, "moe_intermediate_size": 16, "n_shared_experts": 2, "num_nextn_predict_layers": 0,
    "max_position_embeddings": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip
CASES = {
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, QWEN),
    "qwen3, untied, yarn": (
        transformers.Qwen3Config, transformers.Qwen3ForCausalLM,
        QWEN | {"tie_word_embeddings": False, "rope_parameters": YARN, "rms_norm_eps": 1e-5},
    ),
    "deepseek-v3": (transformers.DeepseekV3Config, transformers.DeepseekV3ForCausalLM, DEEPSEEK),
    "deepseek-v3, yarn": (
        transformers.DeepseekV3Config, transformers.DeepseekV3ForCausalLM,
        DEEPSEEK | {"rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 1.0}},
    ),
    "deepseek-v3, plain queries": (
        transformers.DeepseekV3Config, transformers.DeepseekV3ForCausalLM,
        DEEPSEEK | {"q_lora_rank": None, "norm_topk_prob": False, "routed_scaling_factor": 1.0},
    ),
    "deepseek-v3, plain queries, yarn, halves": (
        transformers.DeepseekV3Config, transformers.DeepseekV3ForCausalLM,
        DEEPSEEK | {"q_lora_rank": None, "rope_interleave": False, "n_group": 1, "topk_group": 1,
                    "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
}  # fmt: skip


def pair(name: str) -> tuple[Any, Any]:
    config_type, model_type, fields = CASES[name]
    theirs = model_type(config_type(**fields, pad_token_id=0, bos_token_id=None, eos_token_id=None)).eval()
    randomise(theirs)
    return theirs, twin(theirs)


def tokens_of(*shape: int) -> Tensor:
    # 0 is the pad token, whose embedding gets no gradient in transformers
    return torch.randint(1, 61, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients(name: str) -> None:
    theirs, ours = pair(name)
    tokens = tokens_of(2, 29)
    want, got = theirs(tokens).logits, ours.logits(ours(tokens))
    assert 0.1 < want.std() < 10
    assert gap(got, want) < 1e-4
    for logits in (want, got):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    mapped = gradients(theirs, ours)
    for key, p in ours.named_parameters():
        assert mapped[key].abs().max() > 0 and gap(p.grad, mapped[key]) < 1e-4, key


@pytest.mark.parametrize("name", CASES)
def test_greedy_decoding_with_a_cache(name: str) -> None:
    theirs, ours = pair(name)
    prompt, new = tokens_of(3, 7), 24
    out = theirs.generate(prompt, max_new_tokens=new, do_sample=False, output_logits=True, return_dict_in_generate=True)
    with torch.no_grad():
        caches, ids, scores = ours.new_caches(3, 7 + new), prompt, []
        logits = ours.logits(ours(prompt, None, caches, 7)[:, -1])
        for at in range(7, 7 + new):
            scores.append(logits)
            ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), 1)
            logits = ours.logits(ours(ids[:, -1:], torch.full((3, 1), at), caches, at + 1)[:, -1])
    assert torch.equal(ids, out.sequences) and len(ids.unique()) > 5
    assert gap(torch.stack(scores), torch.stack(out.logits)) < 1e-4


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("qwen3", "layers.1.mixer.q_norm.weight"),
        ("deepseek-v3", "layers.2.ffn.bias"),
        ("deepseek-v3, yarn", "layers.0.mixer.kv_norm.weight"),
    ],
)
def test_parity_notices_one_changed_tensor(name: str, change: str) -> None:
    theirs, ours = pair(name)
    tokens = tokens_of(2, 29)
    with torch.no_grad():
        ours.state_dict()[change][0] += 0.2
        assert gap(ours.logits(ours(tokens)), theirs(tokens).logits) > 1e-3


def test_parity_notices_a_missing_temperature() -> None:
    theirs, ours = pair("deepseek-v3, yarn")
    for layer in ours.layers:
        layer.mixer.scale = layer.mixer.spec.qk_dim**-0.5
    assert gap(ours.logits(ours(tokens_of(2, 29))), theirs(tokens_of(2, 29)).logits) > 1e-3
