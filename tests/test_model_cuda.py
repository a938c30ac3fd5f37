"""On a GPU everything is what it is on the CPU. Skipped where there is none; CI has none."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from test_engine_generate import CHAT, requests, tags_often
from test_model_zoo import PATTERNS, gap, noisy, spec_of, tokens_of
from test_train_trainer import CONFIG, Counting, busy_model
from trivet.disk import Journal
from trivet.engine import Engine
from trivet.model import Routing, Transformer, ffn
from trivet.train.trainer import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
TOLERANCE = 1e-4  # the sums run in another order


def both(name: str) -> tuple[Transformer, Transformer]:
    model = noisy(spec_of(PATTERNS[name]))
    return model, copy.deepcopy(model).cuda()


@pytest.mark.parametrize("form", [ffn.fused, ffn.sorted_])
@pytest.mark.parametrize("name", PATTERNS)
def test_logits_and_gradients_in_fp32(name: str, form: ffn.Form, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ffn, "pick_form", lambda *_: form)
    cpu, gpu = both(name)
    tokens = tokens_of(2, 33)
    direction = torch.randn(2, 33, cpu.spec.vocab_size, generator=torch.Generator().manual_seed(1))
    want, got = cpu.logits(cpu(tokens)), gpu.logits(gpu(tokens.cuda()))
    assert gap(got.cpu(), want) < TOLERANCE
    (want * direction).sum().backward()
    (got * direction.cuda()).sum().backward()
    for (key, a), b in zip(cpu.named_parameters(), gpu.parameters(), strict=True):
        if a.grad is not None:
            assert b.grad is not None and gap(b.grad.cpu(), a.grad) < TOLERANCE, key


@pytest.mark.parametrize("name", PATTERNS)
def test_packed_rows_in_fp32(name: str) -> None:
    cpu, gpu = both(name)
    tokens = tokens_of(2, 40)
    positions = torch.tensor([[*range(13), *range(20), *range(5), -1, -1], [*range(9), *range(31)]])
    real = positions >= 0
    want, got = cpu(tokens, positions), gpu(tokens.cuda(), positions.cuda())
    assert gap(got.cpu()[real], want[real]) < TOLERANCE
    leaked = gpu(tokens.cuda())  # the twin: one document a row
    assert gap(leaked.cpu()[real], want[real]) > 100 * TOLERANCE


@torch.inference_mode()
@pytest.mark.parametrize("name", PATTERNS)
def test_cached_decode(name: str) -> None:
    cpu, gpu = both(name)
    tokens = tokens_of(3, 23)
    want, caches, out, at = cpu(tokens), gpu.new_caches(3, 23), [], 0
    for size in (9, 4, *[1] * 10):
        positions = torch.arange(at, at + size, device="cuda").expand(3, -1)
        out.append(gpu(tokens[:, at : at + size].cuda(), positions, caches, span=at + size))
        at += size
    assert gap(torch.cat(out, 1).cpu(), want) < TOLERANCE


@pytest.mark.parametrize("name", PATTERNS)
def test_bf16_is_close_and_its_gradients_point_the_same_way(name: str) -> None:
    spec, tokens = spec_of(PATTERNS[name]), tokens_of(2, 33)
    exact, rounded = noisy(spec, std=0.08), noisy(spec, std=0.08).to("cuda", torch.bfloat16)
    routing = Routing()
    want = exact.logits(exact(tokens, routing=routing))
    replay = [chosen.cuda() for chosen in routing.experts]
    got = rounded.logits(rounded(tokens.cuda(), routing=Routing(replay=replay)))
    assert (got.float().cpu() - want).norm() < 0.05 * want.norm()
    direction = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
    (want * direction).sum().backward()
    (got * direction.cuda()).sum().backward()
    for (key, a), b in zip(exact.named_parameters(), rounded.parameters(), strict=True):
        if a.grad is not None:
            assert b.grad is not None
            assert F.cosine_similarity(a.grad.flatten(), b.grad.float().cpu().flatten(), dim=0) > 0.98, key


@pytest.mark.parametrize("name", PATTERNS)
def test_the_engine_writes_the_same_tokens(name: str) -> None:
    """Sampled ones too: a request's randomness is a function of its seed, not of the device."""
    model = tags_often(PATTERNS[name])
    asked = requests(9)
    want = Engine(model, CHAT, max_rows=4, slots=72).generate(asked)
    got = Engine(copy.deepcopy(model).cuda(), CHAT, max_rows=4, slots=72).generate(asked)
    assert [c.tokens for c in got] == [c.tokens for c in want]
    other = Engine(model, CHAT, max_rows=4, slots=72).generate(
        [replace(r, sampling=replace(r.sampling, seed=r.sampling.seed + 1)) for r in asked]
    )
    assert [c.tokens for c in other] != [c.tokens for c in want]  # the twin


@pytest.mark.parametrize("offload", ["none", "optimizer", "gradients"])
def test_training_follows_the_same_losses(tmp_path: Path, offload: str) -> None:
    for device in ("cpu", "cuda"):
        config = CONFIG.model_copy(update={"offload": offload})
        train(busy_model(), Counting(), config, tmp_path / device, device=torch.device(device))
    cpu, gpu = (Journal(tmp_path / device / "metrics.jsonl").read() for device in ("cpu", "cuda"))
    # Muon's iteration runs in bf16 on a GPU, so the paths part slowly.
    assert [row["loss"] for row in gpu] == pytest.approx([row["loss"] for row in cpu], rel=2e-3)
