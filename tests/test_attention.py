"""Prefixes inside SDPA and the open nn.MultiheadAttention, against twins written with matmul and softmax.

Shapes: B batch, T queries, S keys, P prefix positions, H heads, E head width, M model width.
"""

from __future__ import annotations

import copy
import math
import pickle
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointError, checkpoint

from peftlib import attention
from peftlib.attention import PrefixScope, attention_with_weights
from peftlib.errors import PeftlibError
from peftlib.open_attention import Projection, close_projections, mha_forward, open_projections

F64 = torch.float64


# -- the twin ----------------------------------------------------------------------------------------------------------


def naive(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    prefix: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and weights over [prefix, real] of (..., H, ., .) tensors of equal head counts; prefix is (P, H, .)."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query @ key.transpose(-1, -2) * scale
    T, S = scores.shape[-2:]
    if causal:
        i, j = torch.arange(T, device=query.device)[:, None], torch.arange(S, device=query.device)[None, :]
        scores = scores.masked_fill(j > i, -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    if prefix is not None:
        key_HPE, value_HPE = (x.transpose(0, 1).to(query) for x in prefix)
        scores = torch.cat([query @ key_HPE.transpose(-1, -2) * scale, scores], dim=-1)
        value = torch.cat([value_HPE.expand(*value.shape[:-3], *value_HPE.shape), value], dim=-2)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True).detach())
    weights = weights / weights.sum(-1, keepdim=True)
    return weights @ value, weights


class TwinScope(TorchFunctionMode):
    """PrefixScope, written with the twin: what a whole model must give under the real one."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        super().__init__()
        self.prefix = key, value
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return self.twin(*args, **(kwargs or {}))

    def twin(self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        assert dropout_p == 0.0
        n = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(n, 1), v.repeat_interleave(n, 1)
        prefix = tuple(x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in self.prefix)
        return naive(q, k, v, attn_mask, is_causal, scale, prefix)[0]


def rand(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(*shape, dtype=F64, requires_grad=grad)


def grads(out: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    torch.manual_seed(7)
    return torch.autograd.grad(
        out,
        inputs,
        torch.randn(out.shape, dtype=out.dtype, device=out.device),
        materialize_grads=True,
    )


def assert_same(out: Tensor, twin: Tensor, *inputs: Tensor) -> None:
    torch.testing.assert_close(out, twin)
    for got, expected in zip(grads(out, *inputs), grads(twin, *inputs), strict=True):
        torch.testing.assert_close(got, expected)


def sdpa(scopes: list[tuple[Tensor, Tensor]], *args: Any, **kwargs: Any) -> Tensor:
    if not scopes:
        return F.scaled_dot_product_attention(*args, **kwargs)
    with PrefixScope(*scopes[0]):
        return sdpa(scopes[1:], *args, **kwargs)


# -- PrefixScope -------------------------------------------------------------------------------------------------------


@given(
    batch=st.lists(st.integers(0, 3), max_size=2).map(tuple),
    T=st.integers(1, 5),
    S=st.integers(1, 5),
    heads=st.integers(1, 3),
    width=st.integers(1, 5),
    value_width=st.integers(1, 5),
    P=st.integers(0, 4),
    kind=st.sampled_from(["none", "causal", "bool", "bool of one column", "float", "float of one column"]),
    mask_dims=st.integers(2, 4),
    scale=st.sampled_from([None, 0.3]),
    positional=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_prefix_equals_the_twin(
    batch, T, S, heads, width, value_width, P, kind, mask_dims, scale, positional
) -> None:
    torch.manual_seed(0)
    batch = batch or (2,)
    q, k, v = (
        rand(*batch, heads, T, width),
        rand(*batch, heads, S, width),
        rand(*batch, heads, S, value_width),
    )
    prefix = rand(P, heads, width), rand(P, heads, value_width)
    mask = None
    if kind not in ("none", "causal"):
        shape = (*batch, heads, T, 1 if "one" in kind else S)
        shape = shape[max(0, len(shape) - mask_dims) :]
        if "bool" in kind:
            # Without a prefix a row of nothing has no softmax; every row sees something here.
            mask = (torch.rand(shape) < 0.6) | (torch.arange(shape[-1]) == 0)
        else:
            mask = rand(*shape)
    causal = kind == "causal"
    if positional:
        out = sdpa([prefix], q, k, v, mask, 0.0, causal, scale=scale)
    else:
        out = sdpa([prefix], query=q, key=k, value=v, attn_mask=mask, is_causal=causal, scale=scale)
    twin, _ = naive(q, k, v, mask, causal, scale, prefix)
    inputs = (q, k, v, *prefix, *([mask] if kind.startswith("float") else []))
    assert_same(out, twin, *inputs)


@pytest.mark.parametrize("causal", [False, True])
def test_three_dimensional_key_is_one_head(causal: bool) -> None:
    q, k, v = rand(2, 3, 4), rand(2, 5, 4), rand(2, 5, 4)
    prefix = rand(3, 1, 4), rand(3, 1, 4)
    twin, _ = naive(q[:, None], k[:, None], v[:, None], None, causal, None, prefix)
    assert_same(sdpa([prefix], q, k, v, is_causal=causal), twin[:, 0], q, k, v, *prefix)
    twin, _ = naive(q[:1], k[:1], v[:1], None, causal, None, prefix)
    assert_same(sdpa([prefix], q[0], k[0], v[0], is_causal=causal), twin[0], q, k, v, *prefix)


@pytest.mark.parametrize(
    "case", ["model repeats", "torch repeats", "both", "prefix has more", "one key head"]
)
def test_grouped_heads(case: str) -> None:
    n_query, n_key, n_prefix = {
        "model repeats": (4, 4, 2),
        "torch repeats": (4, 2, 2),
        "both": (8, 4, 2),
        "prefix has more": (8, 2, 4),
        "one key head": (4, 1, 4),
    }[case]
    q, k, v = rand(2, n_query, 3, 4), rand(2, n_key, 5, 4), rand(2, n_key, 5, 6)
    prefix = rand(3, n_prefix, 4), rand(3, n_prefix, 6)
    gqa = case in ("torch repeats", "both", "prefix has more")
    out = sdpa([prefix], q, k, v, is_causal=True, enable_gqa=gqa)
    each = [n_query // x.shape[1] for x in (k, v)] + [n_query // n_prefix] * 2
    k_, v_, *prefix_ = (x.repeat_interleave(n, 1) for x, n in zip((k, v, *prefix), each, strict=True))
    twin, _ = naive(q, k_, v_, None, True, None, tuple(prefix_))
    assert_same(out, twin, q, k, v, *prefix)


def test_scopes_nest_outermost_first() -> None:
    q, k, v = rand(2, 2, 3, 4), rand(2, 2, 3, 4), rand(2, 2, 3, 4)
    outer, inner = ((rand(p, 2, 4), rand(p, 2, 4)) for p in (2, 1))
    leaves = (q, k, v, *outer, *inner)
    both = tuple(torch.cat(pair) for pair in zip(outer, inner, strict=True))
    for kwargs in ({}, {"is_causal": True}, {"attn_mask": torch.ones(3, 3).tril().bool()}):
        twin, _ = naive(q, k, v, None, bool(kwargs), None, both)
        assert_same(sdpa([outer, inner], q, k, v, **kwargs), twin, *leaves)
    with PrefixScope(*outer), PrefixScope(*inner):
        out, weights = attention_with_weights(q, k, v)
    twin, full = naive(q, k, v, prefix=both)
    assert_same(out, twin, *leaves)
    torch.testing.assert_close(weights, full[..., 3:])


def test_mode_is_left_even_after_an_error() -> None:
    q = rand(1, 2, 3, 4)
    with pytest.raises(PeftlibError, match="5 heads"):
        sdpa([(rand(1, 5, 4), rand(1, 5, 4))], q, q, q)
    torch.testing.assert_close(F.scaled_dot_product_attention(q, q, q), naive(q, q, q)[0])


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 3, 4), (2, 3, 4), {}),
        ((2, 2, 5), (2, 2, 4), {}),
        ((2, 2, 4), (2, 2, 3), {}),
        ((2, 0, 4), (2, 0, 4), {}),
    ],
    ids=["heads", "key width", "value width", "no heads"],
)
def test_what_does_not_fit_is_refused(shapes) -> None:
    key, value, _ = shapes
    q = rand(1, 2, 3, 4)
    with pytest.raises(PeftlibError, match="Build the prefix from an example"):
        sdpa([(rand(*key), rand(*value))], q, q, q)


def test_malformed_calls_are_refused() -> None:
    q, prefix = rand(1, 2, 3, 4), (rand(2, 2, 4), rand(2, 2, 4))
    with pytest.raises(PeftlibError, match=r"expected \(P, H, E\)"):
        PrefixScope(rand(2, 2, 4), rand(3, 2, 4))
    with pytest.raises(PeftlibError, match="both attn_mask and is_causal"):
        sdpa([prefix], q, q, q, torch.ones(3, 3, dtype=torch.bool), is_causal=True)
    nested = torch.nested.nested_tensor([q[0, 0], q[0, 0]], layout=torch.jagged)
    with pytest.raises(PeftlibError, match="Pad before"):
        sdpa([(rand(2, 1, 4), rand(2, 1, 4))], nested, nested, nested)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_closed_multihead_attention_is_refused_not_skipped(compiled: bool) -> None:
    torch._dynamo.reset()
    layer, x = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), torch.randn(2, 3, 8)
    prefix = torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)

    def run(module, *args):
        with PrefixScope(*prefix):
            return module(*args)

    if compiled:
        # Dynamo answers has_torch_function() without the modes, so the fused kernels are reached.
        run = torch.compile(run, backend="eager")
    for training in (True, False):
        for module, args in ((layer.self_attn, (x, x, x)), (layer, (x,))):
            module.train(training)
            with torch.no_grad(), pytest.raises(Exception, match=r"Target the nn\.MultiheadAttention itself"):
                run(module, *args)


def test_dropout_passes_through() -> None:
    q, prefix = rand(1, 2, 3, 4), (rand(2, 2, 4), rand(2, 2, 4))
    assert sdpa([prefix], q, q, q, dropout_p=1.0).abs().sum() == 0
    torch.manual_seed(0)
    q, value = torch.zeros(64, 2, 8, 4), torch.ones(64, 2, 8, 4)
    out = sdpa([(torch.zeros(2, 2, 4), torch.ones(2, 2, 4))], q, q, value, dropout_p=0.25)
    assert out.std() > 0.1
    assert abs(out.mean() - 1) < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_prefix_takes_the_dtype_of_the_call(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 5, 8, dtype=dtype) for _ in range(3))
    prefix = torch.randn(3, 2, 8), torch.randn(3, 2, 8)
    out = sdpa([prefix], q, k, v, is_causal=True)
    assert out.dtype == dtype
    exact, _ = naive(
        q.double(), k.double(), v.double(), None, True, None, tuple(x.to(dtype).double() for x in prefix)
    )
    direct, _ = naive(q, k, v, None, True, None, prefix)
    # SDPA may err as much as the twin does in this dtype, and a rounding more.
    bound = (direct.double() - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
    assert (out.double() - exact).abs().max() <= 2 * bound


def test_autocast() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 5, 8) for _ in range(3))
    prefix = torch.randn(3, 2, 8, requires_grad=True), torch.randn(3, 2, 8, requires_grad=True)
    mask = torch.randn(5, 5)
    for kwargs in ({"is_causal": True}, {"attn_mask": mask}):
        with torch.autocast("cpu", torch.bfloat16):
            out = sdpa([prefix], q, k.bfloat16(), v.bfloat16(), **kwargs)
        assert out.dtype == torch.bfloat16
        twin, _ = naive(q, k, v, kwargs.get("attn_mask"), "is_causal" in kwargs, None, prefix)
        torch.testing.assert_close(out.float(), twin, atol=0.05, rtol=0.05)
        out.sum().backward()
        assert prefix[0].grad is not None
        assert prefix[0].grad.dtype == torch.float32


@pytest.mark.parametrize("device", ["fake", "meta"])
def test_shapes_without_data(device: str) -> None:
    with FakeTensorMode() if device == "fake" else torch.device("meta"):
        q, k = torch.empty(2, 4, 3, 8), torch.empty(2, 2, 5, 8)
        key = torch.empty(6, 2, 8, requires_grad=True)
        for kwargs in ({"is_causal": True}, {}, {"attn_mask": torch.empty(2, 1, 3, 5)}):
            out = sdpa([(key, key)], q, k, k, enable_gqa=True, **kwargs)
            assert out.shape == (2, 4, 3, 8)
            assert torch.autograd.grad(out.sum(), key)[0].shape == key.shape


class Site(nn.Module):
    """A self-attention module as a user would write it, with a prefix entered around its forward."""

    def __init__(self, kind: str = "causal", P: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.qkv = nn.Linear(8, 24, dtype=F64)
        self.key = nn.Parameter(rand(P, 2, 4))
        self.value = nn.Parameter(rand(P, 2, 4))

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1))
        T = x.shape[1]
        if self.kind == "weights":
            mask = torch.ones(T, T, dtype=torch.bool).tril()
            out, weights = attention_with_weights(q, k, v, mask)
            return torch.cat([out.transpose(1, 2).flatten(2), weights.transpose(1, 2).flatten(2)], dim=-1)
        mask = torch.ones(T, T).tril().log().to(x) if self.kind == "mask" else None
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.kind == "causal")
        return out.transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        with PrefixScope(self.key, self.value), PrefixScope(self.key[:1], self.value[:1]):
            return self.attend(x)


@pytest.mark.parametrize(
    "kind, dynamic",
    [("causal", True), ("causal", False), ("mask", False), ("plain", False), ("weights", True)],
)
def test_compile_without_a_break(kind: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    site = Site(kind)
    compiled = torch.compile(site, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in ((2, 5, 8), (3, 7, 8)):
        x = rand(*shape)
        assert_same(compiled(x), site(x), x, *site.parameters())


def test_compile_with_inductor() -> None:
    torch._dynamo.reset()
    site, x = Site(), rand(2, 5, 8)
    # Forward only: the C++ compiler takes seconds, and the gradients' graph is that of aot_eager.
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(site, fullgraph=True)(x), site(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_around_the_site(reentrant: bool) -> None:
    site, x = Site(), rand(2, 5, 8)
    expected = grads(site(x), x, *site.parameters())
    out = checkpoint(site, x, use_reentrant=reentrant)
    # Reentrant checkpoints work with backward() only.
    torch.manual_seed(7)
    out.backward(torch.randn(out.shape, dtype=F64))
    for tensor, grad in zip((x, *site.parameters()), expected, strict=True):
        torch.testing.assert_close(tensor.grad, grad)


def test_checkpointing_inside_the_site_is_an_error() -> None:
    site, x = Site(), rand(2, 5, 8)
    with PrefixScope(site.key, site.value):
        out = checkpoint(site.attend, x, use_reentrant=False)
        with pytest.raises(PeftlibError, match="Checkpoint the whole attention module"):
            checkpoint(site.attend, x, use_reentrant=True)
    with pytest.raises(CheckpointError):
        out.sum().backward()
    with torch.no_grad():
        site(x)
    site.requires_grad_(False)
    with PrefixScope(site.key, site.value), torch.no_grad():
        site.attend(x)


def test_causal_bias_masks() -> None:
    from torch.nn.attention.bias import causal_lower_right, causal_upper_left

    prefix = rand(3, 2, 4), rand(3, 2, 4)
    for T, S in ((4, 4), (2, 5), (5, 2)):
        q, k = rand(1, 2, T, 4), rand(1, 2, S, 4)
        assert_same(
            sdpa([prefix], q, k, k, causal_upper_left(T, S)), sdpa([prefix], q, k, k, is_causal=True), q, k
        )
        if T <= S:
            mask = torch.ones(T, S, dtype=torch.bool).tril(S - T)
            assert_same(
                sdpa([prefix], q, k, k, causal_lower_right(T, S)), sdpa([prefix], q, k, k, mask), q, k
            )


def test_lower_right_bias_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    # The branch that CUDA takes, where the bias is materialised: two scopes hand it on.
    q, prefix = rand(2, 2, 4, 8), (rand(3, 2, 8), rand(3, 2, 8))
    expected = sdpa([prefix, prefix], q, q, q, is_causal=True)
    seen = []

    class Spy(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is F.scaled_dot_product_attention:
                seen.append(type(kwargs["attn_mask"]).__name__)
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(attention, "_on_real_cuda", lambda *_: True)
    with Spy():
        assert_same(sdpa([prefix, prefix], q, q, q, is_causal=True), expected, q, *prefix)
    assert seen == ["CausalBias"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["causal", "causal, T < S", "plain", "mask"])
def test_cuda(dtype: torch.dtype, kind: str) -> None:
    torch.manual_seed(0)
    T, S = (64, 100) if "<" in kind else (100, 100)
    q, k, v = (torch.randn(2, 4, n, 64, device="cuda", dtype=dtype, requires_grad=True) for n in (T, S, S))
    prefix = tuple(torch.randn(7, 4, 64, device="cuda", requires_grad=True) for _ in range(2))
    mask = torch.rand(2, 1, T, S, device="cuda") < 0.7 if kind == "mask" else None
    causal = "causal" in kind
    out = sdpa([prefix], q, k, v, mask, is_causal=causal)
    inputs = (q, k, v, *prefix)
    exact, _ = naive(
        q.double(), k.double(), v.double(), mask, causal, None, tuple(x.to(dtype) for x in prefix)
    )
    direct, _ = naive(q, k, v, mask, causal, None, prefix)
    expected = (exact, *grads(exact.to(dtype), *inputs))
    pairs = zip((out, *grads(out, *inputs)), (direct, *grads(direct, *inputs)), expected, strict=True)
    for got, plain, reference in pairs:
        bound = (plain.double() - reference).abs().max() + torch.finfo(dtype).eps * reference.abs().max()
        assert (got.double() - reference).abs().max() <= 4 * bound


# -- the open nn.MultiheadAttention ------------------------------------------------------------------------------------

OpenAttention = type(
    "OpenAttention", (nn.MultiheadAttention,), {"forward": mha_forward, "__module__": __name__}
)


def opened(module: nn.Module) -> nn.Module:
    module = copy.deepcopy(module)
    for child in module.modules():
        if type(child) is nn.MultiheadAttention:
            child.__class__ = OpenAttention
            open_projections(child)
    return module


def attention_module(seed: int = 0, **options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(seed)
    mha = nn.MultiheadAttention(8, 2, **{"dtype": F64, **options})
    with torch.no_grad():
        for p in mha.parameters():
            # The biases start at zero, which would hide what is lost of them.
            p.copy_(torch.randn_like(p) * 0.5)
    return mha


HOSTS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "kdim and vdim": {"kdim": 6, "vdim": 5},
    "kdim and vdim, no bias, batch first": {"kdim": 6, "vdim": 5, "bias": False, "batch_first": True},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True, "batch_first": True},
    "bias_kv and zero_attn": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 6, "vdim": 8},
}
B, T, S, H = 3, 4, 5, 2


def masks(kind: str, batched: bool) -> dict[str, Any]:
    """The mask arguments of a call; every query sees at least one key."""
    torch.manual_seed(1)
    hidden_TS = (torch.rand(T, S) < 0.4) & (torch.arange(S) > 0)
    hidden_BTS = (torch.rand(B * H if batched else H, T, S) < 0.4) & (torch.arange(S) > 0)
    padding_BS = torch.arange(S) >= torch.tensor([[5], [3], [1]])
    padding_BS = padding_BS if batched else padding_BS[1]
    return {
        "none": {},
        "mask 2d": {"attn_mask": hidden_TS},
        "mask 3d": {"attn_mask": hidden_BTS},
        "float mask 2d": {"attn_mask": torch.randn(T, S, dtype=F64)},
        "float mask 3d": {"attn_mask": torch.randn(hidden_BTS.shape, dtype=F64)},
        "padding": {"key_padding_mask": padding_BS},
        "float padding": {"key_padding_mask": torch.randn(padding_BS.shape, dtype=F64)},
        "mask and padding": {"attn_mask": hidden_BTS, "key_padding_mask": padding_BS},
        "float mask and padding": {
            "attn_mask": torch.randn(T, S, dtype=F64),
            "key_padding_mask": torch.randn(padding_BS.shape, dtype=F64),
        },
        "causal": {"attn_mask": ~torch.ones(T, S, dtype=torch.bool).tril(), "is_causal": True},
        "causal and padding": {
            "attn_mask": ~torch.ones(T, S, dtype=torch.bool).tril(),
            "is_causal": True,
            "key_padding_mask": padding_BS,
        },
    }[kind]


MASKS = (
    *("none", "mask 2d", "mask 3d", "float mask 2d", "float mask 3d", "padding", "float padding"),
    *("mask and padding", "float mask and padding", "causal", "causal and padding"),
)


def qkv(mha: nn.MultiheadAttention, batched: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(2)
    xs = [torch.randn(n, B, m, dtype=F64) for n, m in ((T, 8), (S, mha.kdim), (S, mha.vdim))]
    xs = [x.transpose(0, 1) if mha.batch_first else x for x in xs] if batched else [x[:, 0] for x in xs]
    return tuple(x.clone().requires_grad_() for x in xs)


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("host", HOSTS)
def test_open_equals_closed(host: str, kind: str, batched: bool) -> None:
    closed = attention_module(**HOSTS[host])
    mha = opened(closed)
    xs, kwargs = qkv(closed, batched), masks(kind, batched)
    named = dict(closed.named_parameters())
    assert dict(mha.named_parameters()).keys() == named.keys()
    for options in (
        {"need_weights": False},
        {"need_weights": True},
        {"need_weights": True, "average_attn_weights": False},
    ):
        out, weights = mha(*xs, **options, **kwargs)
        expected, expected_weights = closed(*xs, **options, **kwargs)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(weights, expected_weights)
        got, want = grads(out, *xs, *mha.parameters()), grads(expected, *xs, *closed.parameters())
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


def test_empty_batch_of_the_open_attention() -> None:
    closed = attention_module(batch_first=True)
    x = torch.empty(0, S, 8, dtype=F64)
    for kwargs in ({}, {"key_padding_mask": torch.empty(0, S, dtype=torch.bool)}):
        for got, expected in zip(opened(closed)(x, x, x, **kwargs), closed(x, x, x, **kwargs), strict=True):
            torch.testing.assert_close(got, expected)


def test_open_equals_the_fused_inference_kernel() -> None:
    closed = attention_module(batch_first=True).eval()
    x = torch.randn(B, S, 8, dtype=F64)
    with torch.no_grad():
        for kwargs in ({}, {"key_padding_mask": torch.arange(S) >= torch.tensor([[5], [3], [1]])}):
            for got, expected in zip(
                opened(closed)(x, x, x, **kwargs), closed(x, x, x, **kwargs), strict=True
            ):
                torch.testing.assert_close(got, expected)


def twin_mha(mha: nn.MultiheadAttention, xs, prefix) -> tuple[Tensor, Tensor]:
    """Batch-first multi-head attention under a prefix, from the host's raw parameters."""
    weights = mha.in_proj_weight.split(8)
    biases = mha.in_proj_bias.split(8)
    q, k, v = (
        (x @ w.T + b).reshape(*x.shape[:2], H, 4).transpose(1, 2)
        for x, w, b in zip(xs, weights, biases, strict=True)
    )
    out, attn = naive(q, k, v, prefix=prefix)
    return out.transpose(1, 2).reshape(xs[0].shape) @ mha.out_proj.weight.T + mha.out_proj.bias, attn


@pytest.mark.parametrize("P", [0, 1, 3, 4])
@pytest.mark.parametrize("keys", [4, 5])
def test_prefix_reaches_the_open_attention_and_its_weights(P: int, keys: int) -> None:
    # As many keys as a head is wide, once: no shape may tell outputs from weights.
    mha = opened(attention_module(batch_first=True))
    xs = qkv(mha)
    xs = (xs[0], xs[1][:, :keys], xs[2][:, :keys])
    prefix = rand(P, H, 4), rand(P, H, 4)
    for need_weights in (False, True):
        with PrefixScope(*prefix):
            out, _ = mha(*xs, need_weights=need_weights, average_attn_weights=False)
        assert_same(out, twin_mha(mha, xs, prefix)[0], *xs, *prefix, *mha.parameters())
    with PrefixScope(*prefix):
        _, weights = mha(*xs, average_attn_weights=False)
    assert_same(weights, twin_mha(mha, xs, prefix)[1][..., P:], *xs[:2], prefix[0])


def test_dropout_of_the_open_attention() -> None:
    closed = attention_module(dropout=0.5, batch_first=True)
    mha, xs = opened(closed), qkv(closed)
    torch.manual_seed(0)
    out, weights = mha(*xs, average_attn_weights=False)
    torch.manual_seed(0)
    expected, expected_weights = closed(*xs, average_attn_weights=False)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(weights, expected_weights)
    # Without weights the kernel draws its own numbers: compare the means over a large batch of one sample.
    n = 3000
    runs = mha(*(x[:1].expand(n, -1, -1) for x in xs), need_weights=False)[0].detach()
    mean = mha.eval()(*xs)[0][0]
    assert ((runs.mean(0) - mean).abs() < 5 * runs.std(0) / math.sqrt(n) + 1e-12).all()


def test_rows_that_see_nothing() -> None:
    closed = attention_module(batch_first=True)
    mha, xs = opened(closed), qkv(closed)
    hidden = torch.zeros(T, S, dtype=torch.bool)
    hidden[1] = True
    out = mha(*xs, attn_mask=hidden, need_weights=False)[0]
    torch.testing.assert_close(out, closed(*xs, attn_mask=hidden, need_weights=False)[0])
    torch.testing.assert_close(out[:, 1], mha.out_proj.bias.expand(B, -1))
    assert mha(*xs, attn_mask=hidden)[0][:, 1].isnan().all()
    # The prefix gives them something to see.
    with PrefixScope(rand(2, H, 4), rand(2, H, 4)):
        assert mha(*xs, attn_mask=hidden)[0].isfinite().all()


def test_errors_are_the_originals() -> None:
    closed = attention_module()
    mha, xs = opened(closed), qkv(closed)
    calls = (
        (xs, {"is_causal": True}),
        (xs, {"attn_mask": torch.zeros(2, 2, dtype=torch.bool)}),
        (xs, {"attn_mask": torch.zeros(B, T, S, dtype=torch.bool)}),
        (xs, {"key_padding_mask": torch.zeros(B, S + 1, dtype=torch.bool)}),
        (xs, {"attn_mask": torch.zeros(T, S, dtype=torch.int)}),
        ((xs[0], xs[1][:, :1], xs[2][:, :1]), {}),
        ((xs[0], xs[1], xs[2][:3]), {}),
        ((xs[0][None], xs[1], xs[2]), {}),
    )
    for args, kwargs in calls:
        for module in (closed, mha):
            with pytest.raises((RuntimeError, AssertionError)):
                module(*args, **kwargs)
    with pytest.warns(UserWarning, match="mismatched key_padding_mask and attn_mask"):
        mha(*xs, attn_mask=torch.zeros(T, S, dtype=F64), key_padding_mask=torch.zeros(B, S, dtype=torch.bool))


@pytest.mark.parametrize("need_weights", [False, True])
def test_compile_of_the_open_attention(need_weights: bool) -> None:
    torch._dynamo.reset()
    mha = opened(attention_module(batch_first=True))
    xs, prefix = qkv(mha), (rand(2, H, 4), rand(2, H, 4))

    kwargs = masks("mask and padding", True)

    def run(*xs):
        with PrefixScope(*prefix):
            out, weights = mha(*xs, need_weights=need_weights, **kwargs)
        return out if weights is None else torch.cat([out.flatten(), weights.flatten()])

    assert_same(torch.compile(run, fullgraph=True, backend="aot_eager")(*xs), run(*xs), *xs[:2], prefix[0])


def test_autocast_of_the_open_attention() -> None:
    closed = attention_module(add_bias_kv=True, batch_first=True, dtype=torch.float32)
    mha, xs = opened(closed), tuple(x.detach().float() for x in qkv(closed))
    with torch.autocast("cpu", torch.bfloat16):
        for kwargs in (masks("mask and padding", True), {}):
            for need_weights in (False, True):
                got, expected = (m(*xs, need_weights=need_weights, **kwargs) for m in (mha, closed))
                torch.testing.assert_close(got[0].float(), expected[0].float(), atol=0.05, rtol=0.05)


# -- nested tensors ----------------------------------------------------------------------------------------------------

nested_is_a_prototype = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")


@nested_is_a_prototype
@pytest.mark.parametrize("prefixed", [False, True])
def test_encoder_that_nests_its_input(prefixed: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, H, 16, batch_first=True, dtype=F64)
    closed = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval()
    encoder = opened(closed)
    x, padding = torch.randn(3, 6, 8, dtype=F64), torch.arange(6) >= torch.tensor([[4], [6], [1]])
    prefix = rand(2, H, 4), rand(2, H, 4)
    nested = []
    for each in encoder.layers:
        # A hook turns the fused layer off; without one the open attention would not be called at all.
        each.linear1.register_forward_hook(lambda module, args, out: nested.append(out.is_nested))
    with torch.no_grad(), PrefixScope(*prefix) if prefixed else nullcontext():
        out = encoder(x, src_key_padding_mask=padding)
    if prefixed:
        # Any mode turns nesting off, so here the reference is the padded run of training.
        with TwinScope(*prefix):
            expected = encoder(x, src_key_padding_mask=padding)
        torch.testing.assert_close(out, expected)
    else:
        assert all(nested)
        with torch.no_grad():
            torch.testing.assert_close(out, closed(x, src_key_padding_mask=padding))


@nested_is_a_prototype
@pytest.mark.parametrize("need_weights", [False, True])
def test_nested_self_attention(need_weights: bool) -> None:
    closed = attention_module(batch_first=True).eval().requires_grad_(False)
    mha = opened(closed)
    rows = [torch.randn(n, 8, dtype=F64) for n in (3, 5, 1)]
    nested = torch.nested.nested_tensor(rows)
    for average in (True, False):
        with torch.no_grad():
            options = {"need_weights": need_weights, "average_attn_weights": average}
            out, weights = mha(nested, nested, nested, **options)
            expected, expected_weights = closed(nested, nested, nested, **options)
        torch.testing.assert_close(out.to_padded_tensor(0.0), expected.to_padded_tensor(0.0))
        torch.testing.assert_close(weights, expected_weights)
    # Under a prefix, gradients pass through nesting and padding.
    prefix = rand(2, H, 4), rand(2, H, 4)
    with PrefixScope(*prefix):
        out, _ = mha(nested, nested, nested)
    twin = [twin_mha(mha, (row[None],) * 3, prefix)[0][0] for row in rows]
    padded = torch.stack([F.pad(x, (0, 0, 0, 5 - len(x))) for x in twin])
    assert_same(out.to_padded_tensor(0.0), padded, *prefix)


@nested_is_a_prototype
def test_nested_tensors_that_are_refused() -> None:
    mha = opened(attention_module(batch_first=True)).eval()
    rows = [torch.randn(n, 8, dtype=F64) for n in (3, 5)]
    strided, jagged = (torch.nested.nested_tensor(rows, layout=x) for x in (torch.strided, torch.jagged))
    with pytest.raises(PeftlibError, match="without masks"):
        mha(strided, strided, strided, attn_mask=torch.zeros(5, 5))
    with pytest.raises(PeftlibError, match=r"layout torch\.jagged"):
        mha(jagged, jagged, jagged)


# -- projections -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["plain", "no bias", "kdim and vdim", "kdim and vdim, no bias, batch first"])
def test_projections_are_views_and_leave_nothing_behind(host: str) -> None:
    mha = attention_module(**HOSTS[host])
    state, children = list(mha.state_dict()), list(mha._modules)
    open_projections(mha)
    assert list(mha.state_dict()) == state
    assert sum(1 for _ in mha.modules()) == 5
    for i, which in enumerate("qkv"):
        projection = mha.get_submodule(f"{which}_proj")
        assert projection.weight.shape == (projection.out_features, projection.in_features)
        owner, name, rows = projection.owner()
        whole = owner.get_parameter(name)
        assert owner is mha
        assert projection.weight.data_ptr() == (whole if rows is None else whole[rows]).data_ptr()
        if mha.in_proj_bias is None:
            assert projection.bias is None
        else:
            torch.testing.assert_close(projection.bias, mha.in_proj_bias[8 * i : 8 * i + 8])
        x = torch.randn(2, projection.in_features, dtype=F64)
        torch.testing.assert_close(projection(x), F.linear(x, projection.weight, projection.bias))
    assert "q, in_features=8, out_features=8" in repr(mha)
    with pytest.raises(PeftlibError, match="has an attribute q_proj already"):
        open_projections(mha)
    close_projections(mha)
    assert list(mha._modules) == children


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_projections_follow_their_host(duplicate) -> None:
    mha = attention_module()
    open_projections(mha)
    twin = duplicate(nn.Sequential(mha))[0]
    assert isinstance(twin.q_proj, Projection)
    assert twin.q_proj.owner()[0] is twin
    with torch.no_grad():
        twin.in_proj_weight.zero_()
    assert twin.q_proj.weight.abs().sum() == 0
    assert mha.q_proj.weight.abs().sum() > 0


def test_projections_see_what_stands_in_for_the_parameter() -> None:
    class Doubled(nn.MultiheadAttention):
        forward = mha_forward
        in_proj_weight = property(lambda self: self._parameters["in_proj_weight"] * 2)

    mha = attention_module()
    xs = qkv(mha)
    doubled = opened(mha)
    doubled.__class__ = Doubled
    with torch.no_grad():
        mha.in_proj_weight.mul_(2)
    torch.testing.assert_close(doubled(*xs)[0], mha(*xs)[0])


# -- models nobody here wrote ------------------------------------------------------------------------------------------


def tiny(name: str) -> tuple[nn.Module, str, dict[str, Tensor], int]:
    """A random model, the class name of its attention, an input, and its number of key heads; heads are 8 wide."""
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ids = torch.randint(5, 50, (2, 7))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes["intermediate_size"] = 32
    if name == "llama":
        config = hf.LlamaConfig(**sizes, num_key_value_heads=2)
        return hf.LlamaForCausalLM(config), "LlamaAttention", inputs, 2
    if name == "gpt2":
        config = hf.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4)
        return hf.GPT2LMHeadModel(config), "GPT2Attention", {"input_ids": ids}, 4
    if name == "bert":
        return hf.BertModel(hf.BertConfig(**sizes)), "BertAttention", inputs, 4
    config = hf.T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
    return (
        hf.T5ForConditionalGeneration(config),
        "T5Attention",
        {**inputs, "decoder_input_ids": ids[:, :5]},
        4,
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_transformers_models(name: str) -> None:
    model, class_name, inputs, n_heads = tiny(name)
    model = model.double().eval()
    model.config._attn_implementation = "sdpa"
    sites = [m for m in model.modules() if type(m).__name__ == class_name]
    prefix = rand(3, n_heads, 8), rand(3, n_heads, 8)
    plain = model(**inputs, use_cache=False)[0].detach()
    for site in (sites[0], sites[-1]):
        original, outs, calls = type(site), [], 0
        for scope in (PrefixScope, TwinScope):

            def forward(self, *args, original=original, scope=scope, **kwargs):
                nonlocal calls
                with scope(*prefix) as mode:
                    out = original.forward(self, *args, **kwargs)
                calls += getattr(mode, "calls", 0)
                return out

            site.__class__ = type(class_name, (original,), {"forward": forward})
            outs.append(model(**inputs, use_cache=False)[0])
            site.__class__ = original
        assert calls == 1
        # Rows of padding see nothing without the prefix, and their values mean nothing.
        real = inputs["attention_mask"].bool() if name in ("llama", "bert") else ...
        assert_same(outs[0][real], outs[1][real], *prefix)
        assert not torch.allclose(outs[0], plain)


def test_prefix_with_a_cache() -> None:
    model, class_name, inputs, n_heads = tiny("llama")
    model, ids = model.double().eval(), inputs["input_ids"]
    prefix = rand(3, n_heads, 8), rand(3, n_heads, 8)
    for site in [m for m in model.modules() if type(m).__name__ == class_name]:
        original = type(site)

        def forward(self, *args, original=original, **kwargs):
            with PrefixScope(*prefix):
                return original.forward(self, *args, **kwargs)

        site.__class__ = type(class_name, (original,), {"forward": forward})
    whole = model(ids).logits
    first = model(ids[:, :4], use_cache=True)
    steps = [first.logits]
    for t in range(4, 7):
        steps.append(model(ids[:, t : t + 1], past_key_values=first.past_key_values).logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole)
