"""LoRA against naive twins that form ΔW: every kind of host, output and every gradient, in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import peftlib
from peftlib import LoRA, PeftlibError
from peftlib.kernels import reference
from peftlib.kernels.dropout import draw_seed, dropped
from tests.twin import assert_twins, assert_untouched, classes, randomize, snapshot

D = torch.float64


class Transposed(nn.Module):
    """``x W + b`` with W (in, out), as in transformers' Conv1D, known by its ``nx`` and ``nf`` alone."""

    def __init__(self, nx: int, nf: int):
        super().__init__()
        self.nx, self.nf = nx, nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Int8Linear(nn.Module):
    """A linear-like host that is no ``nn.Linear``: int8 values and a scale per row, both buffers."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, dtype: torch.dtype = D):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer(
            "weight", torch.randint(-127, 128, (out_features, in_features), dtype=torch.int8)
        )
        self.register_buffer("scale", torch.rand(out_features, 1, dtype=dtype) / 127)
        self.register_buffer("bias", torch.randn(out_features, dtype=dtype) if bias else None)

    def dense(self) -> Tensor:
        return self.weight.to(self.scale.dtype) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dense(), self.bias)


def ab(tuning: peftlib.Tuning) -> tuple[Tensor, Tensor]:
    """The two factors of a tuning of one site."""
    named = {name.rpartition(".")[2]: p for name, p in tuning.named_parameters()}
    return named["a"], named["b"]


def with_weights(model: nn.Module, changed: Callable[[], dict[str, Tensor]]) -> Callable[..., Any]:
    """The model's own forward on weights computed anew at each call."""
    return lambda *args, **kwargs: functional_call(model, changed(), args, kwargs)


sizes = st.sampled_from([1, 2, 3, 7, 16])


# -- linear ------------------------------------------------------------------------------------------------------------


@given(
    inside=sizes,
    outside=sizes,
    rank=st.integers(1, 16),
    lead=st.lists(st.sampled_from([0, 1, 2, 5]), max_size=3),
    bias=st.booleans(),
    alpha=st.sampled_from([None, 0.5, -3.0, 16]),
    rslora=st.booleans(),
    transposed=st.booleans(),
    strided=st.booleans(),
    init=st.sampled_from(["kaiming", "gaussian"]),
)
@settings(max_examples=60)
def test_linear_equals_the_dense_update(
    inside: int,
    outside: int,
    rank: int,
    lead: list[int],
    bias: bool,
    alpha: float | None,
    rslora: bool,
    transposed: bool,
    strided: bool,
    init: str,
) -> None:
    torch.manual_seed(inside + 17 * outside)
    rank = min(rank, inside, outside)
    host = (Transposed(inside, outside) if transposed else nn.Linear(inside, outside, bias=bias)).to(D)
    twin = copy.deepcopy(host)
    x = torch.randn(*lead, 2 * inside if strided else inside, dtype=D, requires_grad=True)
    see = (lambda: x[..., ::2]) if strided else (lambda: x)
    tuning = peftlib.attach(host, LoRA(rank=rank, alpha=alpha, use_rslora=rslora, init=init))
    torch.testing.assert_close(host(see()), twin(see()), rtol=0, atol=0)
    leaves = {"x": x, **randomize(tuning)}
    a, b = ab(tuning)
    assert a.shape == (rank, inside)
    assert b.shape == (outside, rank)
    assert a.dtype == D
    assert tuning.num_parameters == rank * (inside + outside)
    s = (rank if alpha is None else alpha) / (math.sqrt(rank) if rslora else rank)

    def naive() -> Tensor:
        dense = s * (b @ a)
        return functional_call(twin, {"weight": twin.weight + (dense.T if transposed else dense)}, (see(),))

    assert_twins(lambda: host(see()), naive, leaves)
    assert host.weight.grad is None
    assert not host.weight.requires_grad


def test_the_conv1d_of_transformers_is_a_transposed_linear() -> None:
    from transformers.pytorch_utils import Conv1D

    host = Conv1D(7, 5).to(D)  # 5 -> 7
    nn.init.normal_(host.bias)
    twin = copy.deepcopy(host)
    tuning = peftlib.attach(host, LoRA(rank=3, alpha=5))
    x = torch.randn(2, 4, 5, dtype=D, requires_grad=True)
    leaves = {"x": x, **randomize(tuning)}
    a, b = ab(tuning)
    assert_twins(
        lambda: host(x),
        lambda: functional_call(twin, {"weight": twin.weight + 5 / 3 * (b @ a).T}, (x,)),
        leaves,
    )


@pytest.mark.parametrize("rows", [[(0, 3)], [(2, 5)], [(4, 9)], [(0, 3), (6, 9)], [(1, 2), (2, 6), (8, 9)]])
@pytest.mark.parametrize("transposed", [False, True])
def test_rows_update_slices_of_a_fused_weight_alone(rows: list[tuple[int, int]], transposed: bool) -> None:
    host = (Transposed(5, 9) if transposed else nn.Linear(5, 9)).to(D)
    twin = copy.deepcopy(host)
    tuning = peftlib.attach(host, LoRA(rank=1, alpha=2, rows=rows))
    x = torch.randn(2, 3, 5, dtype=D, requires_grad=True)
    leaves = {"x": x, **randomize(tuning)}
    a, b = ab(tuning)
    assert tuning.num_parameters == sum(5 + stop - start for start, stop in rows)

    def dense() -> Tensor:
        full = torch.zeros(9, 5, dtype=D)
        at = 0
        for i, (start, stop) in enumerate(rows):
            size = stop - start
            block = torch.zeros(9, size, dtype=D)
            block[start:stop] = torch.eye(size, dtype=D)
            full = full + block @ (2.0 * b[at : at + size] @ a[i : i + 1])
            at += size
        return full.T if transposed else full

    assert_twins(
        lambda: host(x), lambda: functional_call(twin, {"weight": twin.weight + dense()}, (x,)), leaves
    )
    merged = host(x)
    tuning.merge()
    torch.testing.assert_close(host(x), merged, rtol=1e-9, atol=1e-10)
    untouched = [i for i in range(9) if not any(start <= i < stop for start, stop in rows)]
    weight, before = (host.weight.T, twin.weight.T) if transposed else (host.weight, twin.weight)
    assert torch.equal(weight[untouched], before[untouched])


def test_each_slice_starts_as_a_lora_of_its_own() -> None:
    host = nn.Linear(64, 96)
    a, b = ab(peftlib.attach(host, LoRA(rank=4, rows=[(0, 32), (64, 96)])))
    assert a.shape == (8, 64)
    assert b.shape == (64, 4)
    assert not b.any()
    assert a.abs().max() <= 1 / 8 < a.abs().max() * 1.05
    gaussian, _ = ab(peftlib.attach(host, LoRA(rank=4, rows=[(0, 32), (64, 96)], init="gaussian"), name="g"))
    assert 0.2 < gaussian.std() < 0.3


# -- convolutions ------------------------------------------------------------------------------------------------------


@given(
    dims=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 3]),
    per_group=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    kernel=st.lists(st.integers(1, 3), min_size=3, max_size=3),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    padding=st.sampled_from([0, 1, 2, "same", "valid"]),
    padding_mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    bias=st.booleans(),
    dora=st.booleans(),
    batched=st.booleans(),
)
@settings(max_examples=60)
def test_convolution_equals_the_dense_update(
    dims: int,
    groups: int,
    per_group: tuple[int, int],
    kernel: list[int],
    stride: int,
    dilation: int,
    padding: int | str,
    padding_mode: str,
    bias: bool,
    dora: bool,
    batched: bool,
) -> None:
    stride = 1 if padding == "same" else stride
    torch.manual_seed(dims)
    inside, outside = groups * per_group[0], groups * per_group[1]
    host = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](
        inside,
        outside,
        kernel[:dims],
        stride=stride,
        dilation=dilation,
        padding=padding,
        padding_mode=padding_mode,
        groups=groups,
        bias=bias,
        dtype=D,
    )
    twin = copy.deepcopy(host)
    shape = (inside, *range(6, 6 + dims))
    x = torch.randn(*((2, *shape) if batched else shape), dtype=D, requires_grad=True)
    rank = min(2, per_group[1], per_group[0] * math.prod(kernel[:dims]))
    tuning = peftlib.attach(host, LoRA(rank=rank, alpha=3, use_dora=dora), targets=[""])
    torch.testing.assert_close(host(x), twin(x), rtol=1e-12, atol=1e-12)
    leaves = {"x": x, **randomize(tuning)}
    a, b = ab(tuning)

    def naive() -> Tensor:
        blocks = []
        for g in range(groups):
            a_g = a[g * rank : (g + 1) * rank].flatten(1)
            b_g = b[g * per_group[1] : (g + 1) * per_group[1]].flatten(1)
            blocks.append(b_g @ a_g)
        weight = twin.weight + 3 / rank * torch.cat(blocks).view_as(twin.weight)
        if dora:
            norm = weight.detach().flatten(1).norm(dim=1)
            weight = weight * (leaves["lora.magnitude.m"] / norm).view(-1, *[1] * (dims + 1))
        return functional_call(twin, {"weight": weight}, (x,))

    assert_twins(lambda: host(x), naive, leaves, rtol=1e-8, atol=1e-9)
    unmerged = host(x)
    tuning.merge()
    torch.testing.assert_close(host(x), unmerged, rtol=1e-8, atol=1e-9)
    tuning.unmerge()
    assert torch.equal(host.weight, twin.weight)


def test_depthwise_convolution_keeps_a_rank_per_group() -> None:
    host = nn.Conv2d(4, 8, 3, groups=4)
    tuning = peftlib.attach(host, LoRA(rank=2), targets=[""])
    a, b = ab(tuning)
    assert a.shape == (4 * 2, 1, 3, 3)
    assert b.shape == (8, 2, 1, 1)
    with pytest.raises(PeftlibError, match="rank 3 is larger than its matrix of 9 by 2"):
        peftlib.attach(nn.Conv2d(4, 8, 3, groups=4), LoRA(rank=3), targets=[""])


# -- embeddings --------------------------------------------------------------------------------------------------------


@given(
    vocabulary=st.sampled_from([1, 4, 11]),
    width=st.sampled_from([1, 3, 8]),
    rank=st.integers(1, 8),
    lead=st.lists(st.sampled_from([0, 1, 3]), max_size=2),
    padded=st.booleans(),
)
@settings(max_examples=30)
def test_embedding_equals_the_dense_update(
    vocabulary: int, width: int, rank: int, lead: list[int], padded: bool
) -> None:
    rank = min(rank, vocabulary, width)
    host = nn.Embedding(vocabulary, width, padding_idx=vocabulary - 1 if padded else None, dtype=D)
    twin = copy.deepcopy(host)
    ids = torch.randint(0, vocabulary, lead)
    tuning = peftlib.attach(host, LoRA(rank=rank, alpha=5), targets=[""])
    assert torch.equal(host(ids), twin(ids))
    leaves = randomize(tuning)
    a, b = ab(tuning)

    def naive() -> Tensor:
        rows = a
        if padded:  # a padding row gets no gradient, as in the embedding itself
            keep = (torch.arange(vocabulary) != vocabulary - 1)[:, None]
            rows = torch.where(keep, a, a.detach())
        return twin.weight[ids] + 5 / rank * rows[ids] @ b.T

    assert_twins(lambda: host(ids), naive, leaves)
    unmerged = host(ids)
    tuning.merge()
    torch.testing.assert_close(host(ids), unmerged, rtol=1e-9, atol=1e-10)


def test_a_padding_row_stays_what_it_was() -> None:
    host = nn.Embedding(6, 4, padding_idx=2)
    tuning = peftlib.attach(host, LoRA(rank=2), targets=[""])
    optimizer = torch.optim.SGD(tuning.parameters(), lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        host(torch.arange(6)).square().sum().backward()
        optimizer.step()
    out = host(torch.arange(6))
    assert not out[2].any()
    assert not torch.equal(out, host.weight)


def test_embedding_starts_with_normal_b_and_zero_a() -> None:
    a, b = ab(peftlib.attach(nn.Embedding(1000, 400), LoRA(rank=8), targets=[""]))
    assert not a.any()
    assert abs(b.mean()) < 0.06
    assert 0.95 < b.std() < 1.05


# -- nn.MultiheadAttention ---------------------------------------------------------------------------------------------


def mha_cases() -> list[Any]:
    shapes = {"same": {}, "kdim": {"kdim": 5}, "kdim and vdim": {"kdim": 5, "vdim": 7}}
    return [
        pytest.param({**shape, "bias": bias}, which, id=f"{name}, {which}{'' if bias else ', no bias'}")
        for name, shape in shapes.items()
        for which in ("q_proj", "k_proj", "v_proj", "out_proj")
        for bias in (True, False)
    ]


@pytest.mark.parametrize("options, which", mha_cases())
@pytest.mark.parametrize("dora", [False, True])
def test_each_projection_of_an_attention(options: dict[str, Any], which: str, dora: bool) -> None:
    host = nn.MultiheadAttention(8, 2, batch_first=True, dtype=D, **options)
    for parameter in host.parameters():
        nn.init.normal_(parameter, std=0.5)
    twin = copy.deepcopy(host)
    q = torch.randn(3, 4, 8, dtype=D, requires_grad=True)
    k = torch.randn(3, 6, options.get("kdim", 8), dtype=D, requires_grad=True)
    v = torch.randn(3, 6, options.get("vdim", 8), dtype=D, requires_grad=True)
    mask = torch.zeros(3, 6, dtype=torch.bool)
    mask[1, 4:] = True
    tuning = peftlib.attach(host, LoRA(rank=2, alpha=3, use_dora=dora), targets=[which])
    assert list(tuning.sites) == [which]
    leaves = {"q": q, "k": k, "v": v, **randomize(tuning)}
    a, b = ab(tuning)
    fused = which != "out_proj" and not options.keys() & {"kdim", "vdim"}
    name = (
        {True: "in_proj_weight", False: f"{which}_weight"}[fused]
        if which != "out_proj"
        else "out_proj.weight"
    )
    rows = slice("qkv".index(which[0]) * 8, "qkv".index(which[0]) * 8 + 8) if fused else slice(None)

    def weights() -> dict[str, Tensor]:
        weight = twin.get_parameter(name)
        part = weight[rows] + 1.5 * (b @ a)
        if dora:
            m = leaves[f"{which}.lora.magnitude.m"]
            part = m[:, None] * part / part.detach().norm(dim=1, keepdim=True)
        before, after = weight[: rows.start or 0], weight[rows.stop or len(weight) :]
        return {name: torch.cat([before, part, after])}

    for need_weights in (False, True):
        call = {"key_padding_mask": mask, "need_weights": need_weights}
        assert_twins(
            lambda call=call: host(q, k, v, **call)[0],
            lambda call=call: with_weights(twin, weights)(q, k, v, **call)[0],
            leaves,
        )
    unmerged = host(q, k, v, key_padding_mask=mask)
    tuning.merge()
    merged = host(q, k, v, key_padding_mask=mask)
    torch.testing.assert_close(merged, unmerged, rtol=1e-9, atol=1e-10)
    tuning.unmerge()
    assert all(torch.equal(p, q) for p, q in zip(host.parameters(), twin.parameters(), strict=False))


def test_an_attention_as_a_target_means_its_four_projections() -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "other": nn.Linear(8, 8)})
    tuning = peftlib.attach(model, LoRA(rank=2), targets=["attn"])
    assert set(tuning.sites) == {"attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj"}
    assert tuning.num_parameters == 4 * 2 * 16


# -- raw parameters ----------------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Stacked matrices (E, O, I), one per row of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5, 4, dtype=D))
        self.gate_up = nn.Parameter(torch.randn(3, 5, 4, dtype=D))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ebi,eoi->ebo", x, self.weight)


def test_stacked_experts_get_an_update_each() -> None:
    host = Experts()
    twin = copy.deepcopy(host)
    tuning = peftlib.attach(host, LoRA(rank=2, alpha=6), targets=["weight"])
    x = torch.randn(3, 2, 4, dtype=D, requires_grad=True)
    assert torch.equal(host(x), twin(x))
    leaves = {"x": x, **randomize(tuning)}
    a, b = ab(tuning)
    assert a.shape == (3, 2, 4)
    assert b.shape == (3, 5, 2)

    def naive() -> Tensor:
        dense = torch.stack([twin.weight[e] + 3.0 * b[e] @ a[e] for e in range(3)])
        return functional_call(twin, {"weight": dense}, (x,))

    assert_twins(lambda: host(x), naive, leaves)
    unmerged = host(x)
    tuning.merge()
    torch.testing.assert_close(host(x), unmerged, rtol=1e-9, atol=1e-10)
    tuning.detach()
    assert torch.equal(host.weight, twin.weight)
    assert type(host) is Experts


class ReadsWeight(nn.Module):
    """A parent that applies its child's weight itself, so that the child's forward never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 5, dtype=D)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.fc.weight, self.fc.bias)


def test_a_parent_that_reads_the_weight_sees_the_update() -> None:
    model = ReadsWeight()
    twin = copy.deepcopy(model)
    tuning = peftlib.attach(model, LoRA(rank=2), targets=["fc.weight"])
    x = torch.randn(3, 4, dtype=D, requires_grad=True)
    leaves = {"x": x, **randomize(tuning)}
    a, b = ab(tuning)
    changed = with_weights(twin, lambda: {"fc.weight": twin.fc.weight + b @ a})
    assert_twins(lambda: model(x), lambda: changed(x), leaves)
    with tuning.disabled():
        assert torch.equal(model(x), twin(x))


def test_a_fused_qkv_weight_of_an_attention() -> None:
    host = nn.MultiheadAttention(6, 2, dtype=D)
    twin = copy.deepcopy(host)
    tuning = peftlib.attach(host, LoRA(rank=2), targets=["in_proj_weight"])
    x = torch.randn(5, 2, 6, dtype=D, requires_grad=True)
    leaves = {"x": x, **randomize(tuning)}
    a, b = ab(tuning)
    assert a.shape == (2, 6)
    assert b.shape == (18, 2)
    changed = with_weights(twin, lambda: {"in_proj_weight": twin.in_proj_weight + b @ a})
    assert_twins(lambda: host(x, x, x)[0], lambda: changed(x, x, x)[0], leaves)


def test_a_raw_convolution_weight_is_the_matrix_it_multiplies_with() -> None:
    host = nn.Conv2d(3, 5, 2, dtype=D)
    twin = copy.deepcopy(host)
    tuning = peftlib.attach(host, LoRA(rank=2), targets=["weight"])
    x = torch.randn(2, 3, 6, 6, dtype=D, requires_grad=True)
    leaves = {"x": x, **randomize(tuning)}
    a, b = ab(tuning)
    assert a.numel() == 2 * 12
    assert b.numel() == 5 * 2
    assert_twins(
        lambda: host(x),
        lambda: functional_call(twin, {"weight": twin.weight + (b @ a).view(5, 3, 2, 2)}, (x,)),
        leaves,
    )


def test_a_tied_weight_is_changed_where_it_was_named_only() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    tuning = peftlib.attach(model, LoRA(rank=2), targets=["a.weight"])
    randomize(tuning)
    x = torch.randn(2, 4)
    assert not torch.equal(model["a"].weight, model["b"].weight)
    assert torch.equal(model["b"](x), F.linear(x, model["b"].weight, model["b"].bias))
    with pytest.raises(PeftlibError, match="shared with 'b'"):
        tuning.merge()


# -- DoRA --------------------------------------------------------------------------------------------------------------


def dora(weight: Tensor, a: Tensor, b: Tensor, m: Tensor, s: float) -> Tensor:
    """``m (W + s B A) / |W + s B A|`` by rows, the norm a constant."""
    adapted = weight + s * b @ a
    return m[:, None] * adapted / adapted.detach().norm(dim=1, keepdim=True)


@given(inside=sizes, outside=sizes, rank=st.integers(1, 4), bias=st.booleans(), transposed=st.booleans())
@settings(max_examples=40)
def test_dora_equals_its_definition(
    inside: int, outside: int, rank: int, bias: bool, transposed: bool
) -> None:
    rank = min(rank, inside, outside)
    host = (Transposed(inside, outside) if transposed else nn.Linear(inside, outside, bias=bias)).to(D)
    twin = copy.deepcopy(host)
    x = torch.randn(2, 3, inside, dtype=D, requires_grad=True)
    tuning = peftlib.attach(host, LoRA(rank=rank, alpha=3, use_dora=True))
    torch.testing.assert_close(host(x), twin(x), rtol=1e-12, atol=1e-12)
    assert tuning.num_parameters == rank * (inside + outside) + outside
    leaves = {"x": x, **randomize(tuning)}

    def naive() -> Tensor:
        weight = twin.weight.T if transposed else twin.weight
        new = dora(weight, *ab(tuning), leaves["lora.magnitude.m"], 3 / rank)
        return F.linear(x, new, twin.bias)

    assert_twins(lambda: host(x), naive, leaves, rtol=1e-8, atol=1e-9)
    unmerged = host(x)
    tuning.merge()
    torch.testing.assert_close(host(x), unmerged, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("use_dora", [True, False])
@pytest.mark.parametrize("width", [5, 600])  # beyond one block of rows
def test_an_opaque_int8_host(bias: bool, use_dora: bool, width: int) -> None:
    host = Int8Linear(width, 7, bias)
    twin = copy.deepcopy(host)
    x = torch.randn(3, width, dtype=D, requires_grad=True)
    tuning = peftlib.attach(host, LoRA(rank=3, alpha=6, use_dora=use_dora))
    torch.testing.assert_close(host(x), twin(x), rtol=1e-5, atol=1e-5)
    leaves = {"x": x, **randomize(tuning)}
    a, b = ab(tuning)
    assert a.dtype == D

    def naive() -> Tensor:
        if not use_dora:
            return twin(x) + 2.0 * (x @ a.T) @ b.T
        return F.linear(x, dora(twin.dense(), a, b, leaves["lora.magnitude.m"], 2.0), twin.bias)

    assert_twins(lambda: host(x), naive, leaves, rtol=1e-8, atol=1e-9)
    assert not [k for k in host.state_dict() if "base" in k]
    with pytest.raises(PeftlibError, match="opaque"):
        tuning.merge()


def test_dora_of_a_wider_dtype_on_an_opaque_host() -> None:
    host = Int8Linear(6, 4, dtype=torch.bfloat16)
    x = torch.randn(3, 6, dtype=torch.bfloat16)
    before = host(x)
    tuning = peftlib.attach(host, LoRA(rank=2, use_dora=True, dtype=torch.float32))
    after = host(x)
    assert after.dtype == torch.bfloat16
    assert {p.dtype for p in tuning.parameters()} == {torch.float32}
    torch.testing.assert_close(after, before, rtol=0.02, atol=0.02)


def test_dora_survives_a_row_of_zeros() -> None:
    host = nn.Linear(4, 3, dtype=D)
    nn.init.zeros_(host.weight[1])
    twin = copy.deepcopy(host)
    x = torch.randn(2, 4, dtype=D, requires_grad=True)
    tuning = peftlib.attach(host, LoRA(rank=2, use_dora=True))
    torch.testing.assert_close(host(x), twin(x), rtol=1e-12, atol=1e-12)
    host(x).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in tuning.parameters())


# -- dropout and starts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_dora", [False, True])
def test_dropout_acts_on_the_input_of_the_update_alone(use_dora: bool) -> None:
    host = nn.Linear(6, 5, dtype=D)
    twin = copy.deepcopy(host)
    tuning = peftlib.attach(host, LoRA(rank=2, dropout=0.4, use_dora=use_dora))
    leaves = randomize(tuning)
    a, b = ab(tuning)
    x = torch.randn(50, 6, dtype=D)

    def naive(p: float) -> Tensor:
        if not use_dora:
            kept = reference.drop(x, dropped(draw_seed(), x.numel(), p, x.device), p) if p else x
            return twin(x) + kept @ a.T @ b.T
        kept = F.dropout(x, p) if p else x
        scale = leaves["lora.magnitude.m"] / (twin.weight + b @ a).detach().norm(dim=1)
        return scale * (x @ twin.weight.T + kept @ a.T @ b.T) + twin.bias

    def seeded(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def inner() -> Tensor:
            torch.manual_seed(7)
            return run()

        return inner

    host.train()
    assert_twins(seeded(lambda: host(x)), seeded(lambda: naive(0.4)), leaves)
    host.eval()
    assert_twins(lambda: host(x), lambda: naive(0.0), leaves)


def test_dropout_keeps_the_expectation() -> None:
    host = nn.Linear(6, 5, dtype=D)
    tuning = peftlib.attach(host, LoRA(rank=2, dropout=0.3))
    randomize(tuning)
    x = torch.randn(6, dtype=D)
    host.train()
    draws = host(x.expand(40_000, 6))
    host.eval()
    error = draws.std(0) / 200
    assert ((draws.mean(0) - host(x)).abs() < 5 * error).all()
    assert (error > 0).all()


@pytest.mark.parametrize("host", [nn.Embedding(9, 8), nn.Conv1d(8, 8, 1)], ids=["embedding", "convolution"])
def test_dropout_reaches_other_hosts_in_training_only(host: nn.Module) -> None:
    tuning = peftlib.attach(host, LoRA(rank=4, dropout=0.5), targets=[""])
    randomize(tuning)
    x = torch.arange(9) if isinstance(host, nn.Embedding) else torch.randn(2, 8, 5)
    assert not torch.equal(host.train()(x), host.train()(x))
    assert torch.equal(host.eval()(x), host.eval()(x))


@pytest.mark.parametrize("training", [True, False])
def test_a_delta_comes_in_the_mode_of_its_host(training: bool) -> None:
    model = nn.ModuleDict({"fc": nn.Linear(4, 4), "attn": nn.MultiheadAttention(4, 2)}).train(training)
    tuning = peftlib.attach(model, LoRA(rank=2, dropout=0.5))
    randomize(tuning)
    x = torch.randn(8, 1, 4)
    for run in (lambda: model["fc"](x), lambda: model["attn"](x, x, x)[0]):
        assert torch.equal(run(), run()) != training
    assert len(tuning.sites) == 5


@pytest.mark.parametrize(
    "host, fan_in",
    [(nn.Linear(300, 500), 300), (nn.Conv2d(20, 64, (3, 5)), 300), (nn.Conv1d(40, 64, 5, groups=2), 100)],
    ids=["linear", "conv2d", "grouped conv1d"],
)
def test_a_starts_kaiming_uniform_and_b_zero(host: nn.Module, fan_in: int) -> None:
    a, b = ab(peftlib.attach(host, LoRA(rank=32), targets=[""]))
    bound = 1 / math.sqrt(fan_in)  # kaiming-uniform with slope sqrt 5
    assert a.abs().max() <= bound < 1.01 * a.abs().max()
    assert not b.any()
    assert abs(a.mean()) < 0.05 * bound
    assert abs(a.std() / (bound / math.sqrt(3)) - 1) < 0.03


def test_a_starts_gaussian_with_spread_one_over_rank() -> None:
    a, b = ab(peftlib.attach(nn.Linear(300, 500), LoRA(rank=16, init="gaussian")))
    assert abs(a.std() * 16 - 1) < 0.05
    assert abs(a.mean()) < 0.005
    assert not b.any()
    # Uniform values never leave sqrt(3) standard deviations; of 4800 normal ones, about 8 % do.
    assert 0.05 < (a.abs() > 1.7321 / 16).double().mean() < 0.12


# -- dtypes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize(
    "make",
    [lambda: nn.Linear(4, 4), lambda: nn.Conv1d(4, 4, 1), lambda: nn.MultiheadAttention(4, 2)],
    ids=["linear", "convolution", "attention"],
)
def test_wider_factors_leave_the_output_dtype_alone(make: Callable[[], nn.Module], use_dora: bool) -> None:
    host = make().to(torch.bfloat16)
    tuning = peftlib.attach(host, LoRA(rank=2, use_dora=use_dora, dtype=torch.float32), targets=[""])
    assert {p.dtype for p in tuning.parameters()} == {torch.float32}
    x = torch.randn(3, 4, 4, dtype=torch.bfloat16)
    out = host(x, x, x)[0] if isinstance(host, nn.MultiheadAttention) else host(x)
    assert out.dtype == torch.bfloat16


def test_wider_factors_leave_the_output_dtype_of_an_embedding_alone() -> None:
    host = nn.Embedding(5, 4, dtype=torch.bfloat16)
    peftlib.attach(host, LoRA(rank=2, dtype=torch.float32), targets=[""])
    assert host(torch.arange(5)).dtype == torch.bfloat16


def test_factors_follow_the_dtype_of_the_host() -> None:
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        tuning = peftlib.attach(nn.Linear(4, 4).to(dtype), LoRA(rank=2, use_dora=True))
        assert {p.dtype for p in tuning.parameters()} == {dtype}


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"rank": 0}, r"rank=0"),
        ({"rank": -1}, r"rank=-1"),
        ({"rank": 2.0}, r"rank=2\.0"),
        ({"rank": True}, r"rank=True"),
        ({"dropout": 1.0}, r"dropout=1\.0"),
        ({"dropout": -0.1}, r"dropout=-0\.1"),
        ({"alpha": math.nan}, r"alpha=nan"),
        ({"alpha": math.inf}, r"alpha=inf"),
        ({"alpha": 0}, r"alpha=0"),
        ({"alpha": "16"}, r"alpha='16'"),
        ({"init": "ones"}, r"'kaiming' or 'gaussian'"),
        ({"rows": []}, r"ascending, disjoint"),
        ({"rows": [(4, 4)]}, r"ascending, disjoint"),
        ({"rows": [(0, 4), (2, 6)]}, r"ascending, disjoint"),
        ({"rows": [(-2, 4)]}, r"ascending, disjoint"),
        ({"rows": [(0, 4)], "use_dora": True}, r"leave rows out"),
    ],
)
def test_fields_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PeftlibError, match=message):
        LoRA(**fields)


@pytest.mark.parametrize(
    "host, method, target, message",
    [
        (nn.Linear(4, 6), LoRA(rank=5), "", "rank 5 is larger than its matrix of 4 by 6"),
        (nn.Embedding(3, 6), LoRA(rank=4), "", "rank 4 is larger than its matrix of 3 by 6"),
        (nn.Linear(4, 6), LoRA(rank=2, rows=[(0, 7)]), "", "rows reach to 7, the module has 6"),
        (nn.Linear(4, 6), LoRA(rank=2, rows=[(0, 1)]), "", "rank 2 is larger than its matrix of 4 by 1"),
        (nn.Conv1d(4, 6, 1), LoRA(rank=2, rows=[(0, 3)]), "", "slices the output features of a linear-like"),
        (nn.Embedding(4, 6), LoRA(rank=2, use_dora=True), "", "DoRA needs .* not an embedding"),
        (nn.Linear(4, 6), LoRA(rank=2, use_dora=True), "weight", "DoRA needs .* not a raw parameter"),
        (nn.Linear(4, 6), LoRA(rank=2), "bias", "parameters of two or more axes"),
        (nn.Linear(4, 6), LoRA(rank=2, dropout=0.1), "weight", "needs an input to drop"),
        (nn.LayerNorm(4), LoRA(rank=1), "", "LoRA acts on"),
        (nn.ConvTranspose1d(4, 4, 1), LoRA(rank=1), "", "LoRA acts on"),
    ],
)
def test_places_that_cannot_carry_it_are_refused(
    host: nn.Module, method: LoRA, target: str, message: str
) -> None:
    before, kinds = snapshot(host), classes(host)
    with pytest.raises(PeftlibError, match=message):
        peftlib.attach(host, method, targets=[target])
    assert_untouched(host, before, kinds)
    assert all(p.requires_grad for p in host.parameters())


def test_a_default_leaves_out_what_is_too_small_and_says_so() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2), nn.Linear(2, 8))
    tuning = peftlib.attach(model, LoRA(rank=4))
    assert list(tuning.sites) == ["0"]
    assert tuning.skipped == {
        "1": "rank 4 is larger than its matrix of 8 by 2",
        "2": "rank 4 is larger than its matrix of 2 by 8",
    }
    assert "left out 1 (rank 4" in str(peftlib.summary(model))
