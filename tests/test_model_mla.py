"""MLA: the absorbed form equals the expanded form, and both equal the paper's equations head by head."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from test_model_zoo import VOCAB, D, gap
from trivet.model import Transformer
from trivet.model.layers import Layout, added, apply_rope
from trivet.model.mla import LatentAttention
from trivet.spec import MLA, ModelSpec, Rope, SwiGLU, Yarn

YARN = Yarn(factor=40, original_length=64, mscale=0.707, mscale_all_dim=0.707)
SPECS = {
    "plain": MLA(heads=3, kv_rank=10, nope_dim=6, v_dim=7, rope=Rope(dims=4, interleaved=True)),
    "compressed": MLA(heads=3, kv_rank=10, q_rank=9, nope_dim=6, v_dim=12, rope=Rope(dims=4)),
    "yarn": MLA(heads=2, kv_rank=8, q_rank=9, nope_dim=8, v_dim=8, rope=Rope(dims=8, interleaved=True, yarn=YARN)),
}


def mixer_of(spec: MLA) -> LatentAttention:
    model = Transformer(ModelSpec(vocab_size=VOCAB, d_model=D, pattern="m/f", mixers={"m": spec},
                                  ffns={"f": SwiGLU(hidden=8)}))  # fmt: skip
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn(p.shape, generator=g) * 0.2
    mixer = model.layers[0].mixer
    assert isinstance(mixer, LatentAttention)
    return mixer


def as_published(mixer: LatentAttention, h: Tensor) -> Tensor:
    """Equations 9-19 of arXiv 2405.04434 for one row h [T,D], one head and one query at a time."""
    s, length = mixer.spec, len(h)
    rope = Layout(None, 1, length, h.device).rotation(s.rope)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    def rotate(x: Tensor) -> Tensor:  # [T,R]
        return apply_rope(x[None, :, None], rope, s.rope.interleaved)[0, :, 0]

    if s.q_rank is None:
        q = h @ mixer.q_proj[0].weight.T
    else:
        q = norm(h @ mixer.q_proj[0].weight.T, mixer.q_proj[1].weight) @ mixer.q_proj[2].weight.T
    c = norm((h @ mixer.kv_down.weight.T)[:, : s.kv_rank], mixer.kv_norm.weight)
    k_r = rotate((h @ mixer.kv_down.weight.T)[:, s.kv_rank :])
    up = mixer.kv_up.weight.view(s.heads, s.nope_dim + s.v_dim, s.kv_rank)
    m = 1.0 if s.rope.yarn is None else 0.1 * 0.707 * torch.tensor(40.0).log() + 1
    heads = []
    for i in range(s.heads):
        mine = q[:, i * s.qk_dim : (i + 1) * s.qk_dim]
        q_c, q_r = mine[:, : s.nope_dim], rotate(mine[:, s.nope_dim :])
        k_c, v = c @ up[i, : s.nope_dim].T, c @ up[i, s.nope_dim :].T
        rows = []
        for t in range(length):
            score = (k_c[: t + 1] @ q_c[t] + k_r[: t + 1] @ q_r[t]) * s.qk_dim**-0.5 * m**2
            rows.append(score.softmax(0) @ v[: t + 1])
        heads.append(torch.stack(rows))
    return torch.cat(heads, -1) @ mixer.o_proj.weight.T


@pytest.mark.parametrize("name", SPECS)
def test_expanded_is_the_published_equation(name: str) -> None:
    mixer, x = mixer_of(SPECS[name]), torch.randn(1, 13, D, generator=torch.Generator().manual_seed(1))
    got = mixer(x, Layout(None, 1, 13, x.device))
    want = as_published(mixer, x[0])
    assert gap(got[0], want) < 1e-5
    with torch.no_grad():
        mixer.kv_norm.weight[0] += 0.01
    assert gap(got[0], as_published(mixer, x[0])) > 1e-4


@pytest.mark.parametrize("name", SPECS)
def test_absorbed_equals_expanded(name: str) -> None:
    """The same queries against the same memory, values and gradients; a shifted weight breaks it."""
    s, mixer = SPECS[name], mixer_of(SPECS[name])
    g = torch.Generator().manual_seed(2)
    batch, length, slots = 2, 3, 11
    q_nope = torch.randn(batch, length, s.heads, s.nope_dim, generator=g, requires_grad=True)
    q_rope = torch.randn(batch, length, s.heads, s.rope.dims, generator=g, requires_grad=True)
    memory = torch.randn(batch, slots, s.cache_per_token(), generator=g, requires_grad=True)
    mask = torch.rand(batch, 1, length, slots, generator=g) < 0.7
    mask[..., 0] = True
    layout = Layout(
        None, batch, length, torch.device("cpu"), span=slots, _masks={(None, torch.float32): added(mask, torch.float32)}
    )
    direction = torch.randn(batch, length, s.heads, s.v_dim, generator=g)
    leaves = (q_nope, q_rope, memory, mixer.kv_up.weight)
    a, b = mixer.absorbed(q_nope, q_rope, memory, layout), mixer.expanded(q_nope, q_rope, memory, layout)
    assert gap(a, b) < 1e-5
    for da, db in zip(*(torch.autograd.grad((y * direction).sum(), leaves) for y in (a, b)), strict=True):
        assert gap(da, db) < 1e-5
    with torch.no_grad():
        mixer.kv_up.weight[1] += 0.01  # one row of head 0's W_uk
    assert gap(mixer.absorbed(q_nope, q_rope, memory, layout), b) > 1e-4


def test_the_form_with_less_work_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few cached queries are absorbed, many expanded; without a cache, always expanded."""
    mixer = mixer_of(SPECS["plain"])
    s = mixer.spec
    most = s.kv_rank * (s.nope_dim + s.v_dim) // (2 * s.kv_rank - s.nope_dim - s.v_dim)
    assert 1 < most < 40
    taken: list[str] = []
    for form in ("absorbed", "expanded"):
        original = getattr(mixer, form)
        monkeypatch.setattr(mixer, form, lambda *a, f=form, o=original: (taken.append(f), o(*a))[1])
    cache = mixer.new_cache(2, 48, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        for width in (1, most, most + 1):
            at = torch.arange(width).expand(2, -1)
            mixer(torch.randn(2, width, D), Layout(at, 2, width, at.device, span=width), cache)
        mixer(torch.randn(2, 1, D), Layout(None, 2, 1, at.device))
    assert taken == ["absorbed", "absorbed", "expanded", "expanded"]
