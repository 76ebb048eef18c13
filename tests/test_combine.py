"""Combining tunings: against sums, TIES and DARE written out by hand on dense float64 updates, through the weights and
through the model."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import peftlib
from peftlib import (
    Adapter,
    BitFit,
    FullFineTuning,
    LoRA,
    NewHead,
    PartialFineTuning,
    PeftlibError,
    PrefixTuning,
    PromptTuning,
    TokenRows,
)
from peftlib.errors import StateError
from tests.contract import close, differences, same, snapshot
from tests.twin import randomize
from tests.zoo import CASES, HOSTS, Host, Int8Linear, Pair, nudge, seeded

# Torch says so of the nested tensors that its own encoder makes of a padded batch.
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")

HOWS = ("linear", "concat", "svd", "ties", "dare")


class Net(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh())


class Raw(nn.Module):
    """A matrix, a stack of them and a kernel, none of them a module's."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(5, 6))
        self.stack = nn.Parameter(torch.randn(3, 4, 5))
        self.kernel = nn.Parameter(torch.randn(4, 3, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("eoi,bi->beo", self.stack, F.linear(x, self.matrix))
        return F.conv2d(y.reshape(-1, 3, 2, 2), self.kernel).flatten(1)


class Self(nn.Module):
    def __init__(self, **kwargs: int) -> None:
        super().__init__()
        self.attn, self.sizes = nn.MultiheadAttention(8, 2, batch_first=True, **kwargs), kwargs

    def forward(self, x: Tensor) -> Tensor:
        k, v = x[..., : self.sizes.get("kdim", 8)], x[..., : self.sizes.get("vdim", 8)]
        return self.attn(x, k, v)[0]


def conv1d() -> nn.Module:
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(7, 5)


X = torch.randn(4, 6, dtype=torch.float64)
SEQUENCE = torch.randn(2, 3, 8, dtype=torch.float64)
KINDS: dict[str, tuple[Callable[[], nn.Module], Any, Tensor]] = {
    "linear": (lambda: nn.Linear(6, 5), [""], X),
    "conv1d-transposed": (conv1d, [""], X[:, :5]),
    "convolution": (lambda: nn.Conv2d(3, 8, 3, padding=1), [""], torch.randn(2, 3, 4, 4).double()),
    "grouped": (lambda: nn.Conv1d(6, 9, 2, groups=3), [""], torch.randn(2, 6, 5).double()),
    "volume": (lambda: nn.Conv3d(2, 4, 2), [""], torch.randn(1, 2, 3, 3, 3).double()),
    "embedding": (lambda: nn.Embedding(9, 4), [""], torch.arange(9)),
    "attention": (Self, ["attn"], SEQUENCE),
    "attention-of-three-widths": (lambda: Self(kdim=5, vdim=6), ["attn"], SEQUENCE),
    "raw": (Raw, ["matrix", "stack", "kernel"], X),
    "net": (Net, None, X),
}


def made(kind: str) -> tuple[nn.Module, nn.Module, Any, Tensor]:
    build, targets, x = KINDS[kind]
    model = build().double()
    return model, copy.deepcopy(model), targets, x


def tuned(
    model: nn.Module, name: str, method: Any = None, targets: Any = None, **options: Any
) -> peftlib.Tuning:
    method = LoRA(rank=2) if method is None else method
    tuning = peftlib.attach(model, method, targets=targets, name=name, **options)
    randomize(tuning, 0.5)
    tuning.disable()
    return tuning


def three(model: nn.Module, targets: Any) -> None:
    """Tunings that differ in all that a LoRA has: rank, scale, kind of scale."""
    tuned(model, "one", LoRA(rank=2, alpha=3), targets)
    tuned(model, "two", LoRA(rank=1, alpha=-0.7), targets)
    tuned(model, "three", LoRA(rank=2, alpha=1.5, use_rslora=True), targets)


def updates(model: nn.Module, *names: str) -> dict[str, Tensor]:
    """What tunings do to each weight, by the weights of the plain model that computes the same."""
    with peftlib.use(model):
        base = {k: v.clone() for k, v in peftlib.merged_state_dict(model).items()}
    with peftlib.use(model, *names):
        return {k: v - base[k] for k, v in peftlib.merged_state_dict(model).items()}


def matrices(key: str, update: Tensor, model: nn.Module) -> np.ndarray:
    """An update of a weight as the stack of matrices whose rank is limited."""
    owner = model.get_submodule(key.rpartition(".")[0])
    array = update.numpy()
    if key.endswith("in_proj_weight"):
        return array.reshape(3, -1, array.shape[-1])
    if isinstance(owner, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return array.reshape(owner.groups, array.shape[0] // owner.groups, -1)
    return array if array.ndim == 3 else array.reshape(1, array.shape[0], -1)


def best(stack: np.ndarray, rank: int) -> np.ndarray:
    u, s, v = np.linalg.svd(stack, full_matrices=False)
    return (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]


def ties_by_hand(terms: list[tuple[float, Tensor]], density: float) -> Tensor:
    """Algorithm 1 of the paper, element by element."""
    out = torch.zeros_like(terms[0][1])
    kept = []
    for weight, update in terms:
        sizes = sorted(update.abs().flatten().tolist(), reverse=True)
        smallest = sizes[max(1, round(density * len(sizes))) - 1]
        kept.append([weight * v if abs(v) >= smallest else 0.0 for v in update.flatten().tolist()])
    for i, column in enumerate(zip(*kept, strict=True)):
        sign = math.copysign(1, sum(column)) if sum(column) else 0
        agreeing = [v for v in column if v * sign > 0]
        out.view(-1)[i] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return out


WEIGHTS = {"one": 0.5, "two": -1.25, "three": 2.0}


# -- on true updates ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["linear", "concat"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_sum_is_the_sum_of_what_they_do(kind: str, how: str) -> None:
    model, fresh, targets, x = made(kind)
    three(model, targets)
    expected = {k: sum(w * updates(model, n)[k] for n, w in WEIGHTS.items()) for k in fresh.state_dict()}
    combined = peftlib.combine(model, WEIGHTS, how=how)
    found = updates(model, "combined")
    for key, update in expected.items():
        torch.testing.assert_close(found[key], update, rtol=1e-9, atol=1e-12)
    assert combined.combination.error < 1e-14
    assert max(combined.combination.errors.values()) < 1e-14
    assert combined.combination.errors.keys() == combined.sites.keys()
    for parameter, key in ((p, k) for k, p in fresh.named_parameters()):
        parameter.data += expected[key]
    peftlib.use(model, "combined")
    torch.testing.assert_close(model(x), fresh(x), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_are_the_sum_as_far_as_the_matrix_has_room(kind: str) -> None:
    model, fresh, targets, _ = made(kind)
    three(model, targets)
    combined = peftlib.combine(model, WEIGHTS)
    sides = {k: min(matrices(k, v, fresh).shape[1:]) for k, v in fresh.state_dict().items() if v.dim() > 1}
    assert all(m.scaling == 1 and m.dropout == 0 for m in combined.sites.values())
    assert sorted({m.rank for m in combined.sites.values()}) == sorted({min(5, s) for s in sides.values()})


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("how", ["linear", "svd"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_lower_rank_is_the_best_there_is_and_its_error_is_stated(kind: str, how: str, rank: int) -> None:
    model, fresh, targets, _ = made(kind)
    three(model, targets)
    exact = {k: sum(w * updates(model, n)[k] for n, w in WEIGHTS.items()) for k in fresh.state_dict()}
    combined = peftlib.combine(model, WEIGHTS, how=how, rank=rank)
    found = updates(model, "combined")
    lost = total = 0.0
    for key, update in exact.items():
        if update.dim() < 2:
            continue
        stack = matrices(key, update, fresh)
        expected = best(stack, rank)
        np.testing.assert_allclose(matrices(key, found[key], fresh), expected, rtol=1e-9, atol=1e-12)
        lost += float(((stack - expected) ** 2).sum())
        total += float((stack**2).sum())
    assert combined.combination.error == pytest.approx(math.sqrt(lost / total), rel=1e-6, abs=1e-14)
    assert {m.rank for m in combined.sites.values()} <= {1, 2, 3}


def test_svd_takes_the_largest_rank_of_them_if_none_is_given() -> None:
    model, *_ = made("net")
    three(model, None)
    assert {m.rank for m in peftlib.combine(model, WEIGHTS, how="svd").sites.values()} == {2}
    for how in ("ties", "dare"):
        assert {m.rank for m in peftlib.combine(model, WEIGHTS, how=how, name=how).sites.values()} == {2}


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_ties_is_the_papers(kind: str, density: float) -> None:
    model, fresh, targets, x = made(kind)
    three(model, targets)
    sites = peftlib.tunings(model)["one"].sites
    exact = {k: torch.zeros_like(v) for k, v in fresh.state_dict().items()}
    for key in exact:
        terms = [(w, updates(model, n)[key]) for n, w in WEIGHTS.items()]
        if key.endswith("in_proj_weight"):  # three sites in one weight
            parts = [
                ties_by_hand(list(part), density)
                for part in zip(*([(w, u) for u in d.chunk(3)] for w, d in terms), strict=True)
            ]
            exact[key] = torch.cat(parts)
        elif terms[0][1].any():
            exact[key] = ties_by_hand(terms, density)
    rank = max(min(matrices(k, v, fresh).shape[1:]) for k, v in exact.items() if v.dim() > 1)
    combined = peftlib.combine(
        model, WEIGHTS, how="ties", density=density, rank=rank
    )  # of full rank: nothing is lost
    assert combined.combination.error < 1e-13
    found = updates(model, "combined")
    for key, update in exact.items():
        torch.testing.assert_close(found[key], update, rtol=1e-9, atol=1e-12)
    for key, parameter in fresh.named_parameters():
        parameter.data += exact[key]
    peftlib.use(model, "combined")
    torch.testing.assert_close(model(x), fresh(x), rtol=1e-9, atol=1e-10)
    assert combined.sites.keys() == sites.keys()


def test_ties_of_one_tuning_with_all_elements_is_that_tuning_scaled() -> None:
    model, *_ = made("linear")
    tuned(model, "one")
    peftlib.combine(model, {"one": -3.0}, how="ties", density=1.0)
    torch.testing.assert_close(updates(model, "combined")["weight"], -3 * updates(model, "one")["weight"])


def test_ties_by_hand_on_a_small_example() -> None:
    """Trimmed to half: a keeps 4 and -3, b keeps 2 and 5; the signs elected are +, -, +, and nobody speaks for the
    last; where they agree their mean is taken."""
    from peftlib.sums import ties

    a, b = torch.tensor([4.0, -3.0, 1.0, 0.5]), torch.tensor([2.0, 1.0, 5.0, -0.5])
    assert ties([(1.0, a), (1.0, b)], 0.5).tolist() == [3.0, -3.0, 5.0, 0.0]
    # Negative weights elect on what they add; opposite sums elect nobody.
    assert ties([(1.0, a), (-1.0, b)], 0.5).tolist() == [4.0, -3.0, -5.0, 0.0]
    assert ties([(1.0, a), (-1.0, a)], 1.0).tolist() == [0.0] * 4


@pytest.mark.parametrize("density", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["linear", "grouped", "convolution", "raw", "conv1d-transposed"])
def test_dare_keeps_rescales_and_adds_up(kind: str, density: float) -> None:
    model, fresh, targets, _ = made(kind)
    three(model, targets)
    transposed = kind == "conv1d-transposed"
    draws = torch.Generator().manual_seed(7)
    exact = {}
    for site in peftlib.tunings(model)["one"].sites:
        key = f"{site}.weight".lstrip(".") if kind != "raw" else site
        total = torch.zeros_like(fresh.state_dict()[key])
        for name, weight in WEIGHTS.items():
            update = updates(model, name)[key]
            mask = torch.rand(update.T.shape if transposed else update.shape, generator=draws) < density
            total += weight * update * (mask.T if transposed else mask) / density
        exact[key] = total
    rank = max(min(matrices(k, v, fresh).shape[1:]) for k, v in exact.items())
    combined = peftlib.combine(
        model, WEIGHTS, how="dare", density=density, rank=rank, generator=torch.Generator().manual_seed(7)
    )
    assert combined.combination.error < 1e-13
    for key, update in exact.items():
        torch.testing.assert_close(updates(model, "combined")[key], update, rtol=1e-9, atol=1e-12)


def test_dare_draws_from_torch_unless_it_is_given_a_generator() -> None:
    model, *_ = made("linear")
    tuned(model, "one")
    torch.manual_seed(3)
    first = peftlib.combine(model, {"one": 1.0}, how="dare", name="first").state_dict()
    torch.manual_seed(3)
    again = peftlib.combine(model, {"one": 1.0}, how="dare", name="again").state_dict()
    assert all(torch.equal(a, b) for a, b in zip(first.values(), again.values(), strict=True))
    other = peftlib.combine(model, {"one": 1.0}, how="dare", name="other").state_dict()
    assert not all(torch.equal(a, b) for a, b in zip(first.values(), other.values(), strict=True))


def test_the_expectation_of_dare_is_the_sum() -> None:
    from peftlib.sums import dare

    a, b = torch.randn(20, 30, dtype=torch.float64), torch.randn(20, 30, dtype=torch.float64)
    draws = torch.Generator().manual_seed(0)
    mean = sum(dare([(1.0, a), (-0.5, b)], 0.5, draws) for _ in range(4000)) / 4000
    # Each element's spread is |w u| sqrt((1 - p) / p) per draw.
    spread = (a.square() + b.square() / 4).sqrt() / math.sqrt(4000)
    assert ((mean - (a - 0.5 * b)).abs() < 6 * spread).all()


# -- any shapes, ranks, weights, dtypes --------------------------------------------------------------------------------


@st.composite
def some_tunings(draw: Any) -> Any:
    sizes = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    finite = st.floats(-3, 3, allow_nan=False).filter(lambda v: v == 0 or abs(v) > 1e-3)
    ranks = draw(st.lists(st.integers(1, min(sizes)), min_size=1, max_size=4))
    weights = draw(st.lists(finite, min_size=len(ranks), max_size=len(ranks)).filter(any))
    alphas = draw(st.lists(finite.filter(bool), min_size=len(ranks), max_size=len(ranks)))
    return sizes, ranks, weights, alphas


@settings(max_examples=60)
@given(some_tunings(), st.sampled_from(HOWS), st.one_of(st.none(), st.integers(1, 9)), st.integers(0, 5))
def test_whatever_is_combined_the_stated_error_is_the_true_one(
    given: Any, how: str, rank: int | None, seed: int
) -> None:
    (inputs, outputs), ranks, weights, alphas = given
    torch.manual_seed(seed)
    model = nn.Linear(inputs, outputs).double()
    for i, (r, alpha) in enumerate(zip(ranks, alphas, strict=True)):
        tuned(model, f"t{i}", LoRA(rank=r, alpha=alpha))
    wanted = {f"t{i}": w for i, w in enumerate(weights)}
    rank = None if rank is None or how == "concat" else min(rank, inputs, outputs)
    own = {n: updates(model, n)["weight"] for n in wanted}
    if how == "ties":
        exact = ties_by_hand([(w, own[n]) for n, w in wanted.items() if w], 0.2)
    elif how == "dare":
        exact = torch.zeros_like(model.weight)
        draws = torch.Generator().manual_seed(seed)
        for n, w in wanted.items():
            if w:
                exact += 2 * w * own[n] * (torch.rand(exact.shape, generator=draws) < 0.5)
    else:
        exact = sum(w * own[n] for n, w in wanted.items())
    more = {"generator": torch.Generator().manual_seed(seed)} if how == "dare" else {}
    combined = peftlib.combine(model, wanted, how=how, rank=rank, **more)
    found = updates(model, "combined")["weight"]
    size = float(exact.detach().norm())
    error = float((found - exact).detach().norm()) / size if size else 0.0
    scale = max(float((abs(w) * own[n]).norm()) for n, w in wanted.items()) / size if size else 1.0
    assert combined.combination.error == pytest.approx(error, rel=1e-5, abs=1e-12 * max(1, scale))
    if how == "concat" or (how == "linear" and rank is None):
        assert error < 1e-12 * max(1, scale)
    assert combined.sites[""].rank <= min(inputs, outputs, rank or 9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", HOWS)
def test_narrow_dtypes_are_computed_wide_and_rounded_once(dtype: torch.dtype, how: str) -> None:
    model = Net(16).to(dtype)
    tuned(model, "one", LoRA(rank=3, alpha=2))
    tuned(model, "two", LoRA(rank=2))
    wide = Net(16).double()
    wide.load_state_dict(model.state_dict(), strict=False)
    for name in ("one", "two"):
        peftlib.attach(wide, peftlib.tunings(model)[name].sites["a"], name=name).disable()
        peftlib.tunings(wide)[name].load_state_dict(peftlib.tunings(model)[name].state_dict())
    more = {"generator": torch.Generator().manual_seed(0)} if how == "dare" else {}
    narrow = peftlib.combine(model, {"one": 0.7, "two": -0.3}, how=how, **more)
    more = {"generator": torch.Generator().manual_seed(0)} if how == "dare" else {}
    exact = peftlib.combine(wide, {"one": 0.7, "two": -0.3}, how=how, **more)
    assert {t.dtype for t in narrow.state_dict().values()} == {dtype}
    assert {m.dtype for m in narrow.sites.values()} == {None}
    for key, value in exact.state_dict().items():
        torch.testing.assert_close(
            narrow.state_dict()[key], value.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-7
        )
    # The error of rounding is stated as well, not hidden.
    assert narrow.combination.error >= exact.combination.error
    if how in ("linear", "concat"):
        assert narrow.combination.error < torch.finfo(dtype).eps


def test_factors_of_another_dtype_than_the_host_keep_it() -> None:
    model = Net().bfloat16()
    tuned(model, "one", LoRA(rank=1, dtype=torch.float32))
    tuned(model, "two", LoRA(rank=1))
    combined = peftlib.combine(model, {"one": 1.0, "two": 1.0})
    assert {t.dtype for t in combined.state_dict().values()} == {torch.float32}
    assert combined.combination.error < 1e-6


# -- sites and layouts -------------------------------------------------------------------------------------------------


def test_a_site_that_only_some_have_counts_as_zero_in_the_others() -> None:
    model = Net().double()
    tuned(model, "one", LoRA(rank=1), ["a"])
    tuned(model, "two", LoRA(rank=2), ["b"])
    tuned(model, "both", LoRA(rank=1))
    combined = peftlib.combine(model, {"one": 2.0, "two": -1.0, "both": 0.5})
    assert {n: m.rank for n, m in combined.sites.items()} == {"a": 2, "b": 3}
    found = updates(model, "combined")
    for key in ("a.weight", "b.weight"):
        expected = sum(w * updates(model, n)[key] for n, w in {"one": 2.0, "two": -1.0, "both": 0.5}.items())
        torch.testing.assert_close(found[key], expected, rtol=1e-9, atol=1e-12)


def test_a_weight_of_zero_takes_no_room() -> None:
    model = Net().double()
    tuned(model, "one", LoRA(rank=1), ["a"])
    tuned(model, "two", LoRA(rank=2))
    assert {n: m.rank for n, m in peftlib.combine(model, {"one": 1.0, "two": 0.0}).sites.items()} == {"a": 1}


ROWS = {
    "same": ([(0, 4), (6, 9)], [(0, 4), (6, 9)]),
    "uneven": ([(0, 2), (2, 9)], [(0, 2), (2, 9)]),
    "other": ([(0, 4), (6, 9)], [(1, 5)]),
    "some": ([(0, 4), (6, 9)], None),
}


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("rows", ROWS)
def test_ranges_of_rows(rows: str, how: str) -> None:
    model = nn.Linear(7, 9).double()
    one, two = ROWS[rows]
    tuned(model, "one", LoRA(rank=1, rows=one, alpha=2))
    tuned(model, "two", LoRA(rank=2, rows=two))
    weights = {"one": 0.5, "two": -1.5}
    combined = peftlib.combine(
        model, weights, how=how, rank=None if how in ("linear", "concat") else 7 if how != "svd" else 2
    )
    kept = {"same": one, "uneven": None, "other": None, "some": None}[rows]
    method = combined.sites[""]
    if how in ("linear", "concat"):
        assert method.rows == (tuple(kept) if kept else None)
    exact = sum(w * updates(model, n)["weight"] for n, w in weights.items())
    found = updates(model, "combined")["weight"]
    if how in ("linear", "concat"):
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)
    elif how == "ties":
        exact = ties_by_hand([(w, updates(model, n)["weight"]) for n, w in weights.items()], 0.2)
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)
    assert (
        combined.combination.error == pytest.approx(float((found - exact).norm() / exact.norm()), abs=1e-12)
        or how == "dare"
    )


def test_an_opaque_base_needs_no_weight() -> None:
    model, x = Int8Linear(6, 5), torch.randn(3, 6)
    base = model(x)
    tuned(model, "one", LoRA(rank=2), [""])
    tuned(model, "two", LoRA(rank=1), [""])
    outputs = {}
    peftlib.combine(model, {"one": 1.5, "two": -2.0})
    for name in ("one", "two", "combined"):
        peftlib.use(model, name)
        outputs[name] = model(x) - base
    torch.testing.assert_close(
        outputs["combined"], 1.5 * outputs["one"] - 2 * outputs["two"], atol=1e-5, rtol=1e-4
    )


LORA_HOSTS = [h for h in HOSTS.values() if "linear" in h.places and h.only is None]


@pytest.mark.parametrize("host", LORA_HOSTS, ids=str)
def test_every_host_computes_with_the_sum_what_it_computes_with_all_of_them(host: Host) -> None:
    """LoRAs add up when they are enabled together: the sum with weights of 1 is the model with both."""
    pair = Pair(host, CASES["lora"])
    model = host.model().eval()
    for seed, name in enumerate(("one", "two")):
        nudge(pair.attach(model, name), seed=seed, size=0.3)
    both = pair.run(model)
    combined = peftlib.combine(model, {"one": 1.0, "two": 1.0})
    assert same(pair.run(model), both)
    peftlib.use(model, "combined")
    assert close(pair.run(model), both)
    assert combined.combination.error < 1e-6


# -- weights that are trained ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [FullFineTuning(), BitFit(), PartialFineTuning(targets=["a"])], ids=str)
@pytest.mark.parametrize("how", HOWS)
def test_trained_weights_are_combined_by_their_differences_to_the_base(method: Any, how: str) -> None:
    model = Net().double()
    base = {k: v.clone() for k, v in model.state_dict().items()}
    for name in WEIGHTS:
        tuned(model, name, method)
    own = {name: updates(model, name) for name in WEIGHTS}
    more = {"generator": torch.Generator().manual_seed(5)} if how == "dare" else {}
    combined = peftlib.combine(model, WEIGHTS, how=how, **more)
    assert set(combined.sites.values()) == {type(method)()}
    assert combined.num_parameters == peftlib.tunings(model)["one"].num_parameters
    found, draws = updates(model, "combined"), torch.Generator().manual_seed(5)
    for key in base:
        terms = [(w, own[n][key]) for n, w in WEIGHTS.items()]
        if not any(u.any() for _, u in terms):
            expected = torch.zeros_like(base[key])
        elif how == "ties":
            expected = ties_by_hand(terms, 0.2)
        elif how == "dare":
            expected = sum(2 * w * u * (torch.rand(u.shape, generator=draws) < 0.5) for w, u in terms)
        else:
            expected = sum(w * u for w, u in terms)
        torch.testing.assert_close(found[key], expected, rtol=1e-9, atol=1e-12)
    assert combined.combination.error < 1e-14
    combined.detach()
    assert same({k: v for k, v in model.state_dict().items() if k in base}, base)


def test_trained_weights_are_combined_whichever_tuning_is_in_them() -> None:
    results = []
    for enabled in ("one", "other", None):
        with seeded(1):
            model = Net().double()
            for name in ("one", "two", "other"):
                tuned(model, name, FullFineTuning())
        peftlib.use(model, *([enabled] if enabled else []))
        out = model(X)
        peftlib.combine(model, {"one": 0.5, "two": 0.5})
        assert torch.equal(model(X), out)
        peftlib.use(model, "combined")
        results.append(model(X))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_biases_and_updates_in_one_tuning_and_different_kinds_at_one_module() -> None:
    model = Net().double()
    tuned(model, "one", {"a": LoRA(rank=1), "": BitFit()})
    tuned(model, "two", {"a": PartialFineTuning(), "b": LoRA(rank=2)})
    combined = peftlib.combine(model, {"one": 0.5, "two": 2.0})
    assert {n: type(m).__name__ for n, m in combined.sites.items()} == {
        "a": "LoRA", "a (partialfinetuning)": "PartialFineTuning", "b": "BitFit", "b (lora)": "LoRA",
    }  # fmt: skip
    assert combined.combination.errors.keys() == combined.sites.keys()
    found, one, two = (updates(model, n) for n in ("combined", "one", "two"))
    for key in found:
        torch.testing.assert_close(found[key], 0.5 * one[key] + 2 * two[key], rtol=1e-9, atol=1e-12)


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(11, 4), nn.Linear(4, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids).sin())

    model, ids = Tied().double(), torch.arange(5)
    base = model.embed.weight.detach().clone()
    one, two = tuned(model, "one", FullFineTuning()), tuned(model, "two", FullFineTuning())
    values = [next(iter(t.state_dict().values())).clone() for t in (one, two)]
    peftlib.combine(model, {"one": 0.5, "two": -1.0})
    peftlib.use(model, "combined")
    expected = base + 0.5 * (values[0] - base) - (values[1] - base)
    torch.testing.assert_close(model.embed.weight.detach(), expected, rtol=1e-12, atol=1e-12)
    assert model.head.weight is model.embed.weight
    torch.testing.assert_close(model(ids), F.embedding(ids, expected).sin() @ expected.T)


# -- the result is a tuning like any other -----------------------------------------------------------------------------


def test_it_is_attached_and_disabled_and_nothing_else_changes() -> None:
    model = Net()
    one, two = tuned(model, "one").enable(), tuned(model, "two")
    out = model(X.float())
    before = {t.name: {k: v.clone() for k, v in t.state_dict().items()} for t in (one, two)}
    pointers = [t.data_ptr() for t in one.state_dict().values()]
    random = torch.get_rng_state()
    combined = peftlib.combine(model, {"one": 0.5, "two": 0.5}, name="mean")
    assert torch.equal(torch.get_rng_state(), random)
    assert (one.enabled, two.enabled, combined.enabled) == (True, False, False)
    assert torch.equal(model(X.float()), out)
    assert list(peftlib.tunings(model)) == ["one", "two", "mean"]
    assert all(same(t.state_dict(), before[t.name]) for t in (one, two))
    assert [t.data_ptr() for t in one.state_dict().values()] == pointers
    assert all(p.requires_grad for p in combined.parameters())
    assert all(p.is_leaf and p.untyped_storage().nbytes() == p.nbytes for p in combined.parameters())
    one.detach()
    two.detach()
    peftlib.use(model, "mean")
    assert not torch.equal(model(X.float()), out)


def test_it_saves_loads_trains_merges_and_leaves(tmp_path: Any) -> None:
    model = Net()
    fresh, base = copy.deepcopy(model), {k: v.clone() for k, v in model.state_dict().items()}
    tuned(model, "one", LoRA(rank=2, dropout=0.5))
    tuned(model, "two", {"a": LoRA(rank=1), "b": BitFit()})
    combined = peftlib.combine(model, {"one": 0.5, "two": -0.5})
    peftlib.use(model, "combined")
    x = X.float()
    out = model(x)
    assert torch.equal(model.train()(x), out)  # no dropout
    combined.save(tmp_path / "mean.safetensors")
    peftlib.load(fresh, tmp_path / "mean.safetensors")
    assert torch.equal(fresh(x), out)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in combined.parameters())
    torch.testing.assert_close(combined.merge().model(x), out)
    for tuning in peftlib.tunings(model).values():
        tuning.detach()
    assert same(dict(model.state_dict()), base)


def test_a_combination_can_be_combined() -> None:
    model = Net().double()
    three(model, None)
    peftlib.combine(model, {"one": 1.0, "two": 2.0}, name="first")
    peftlib.combine(model, {"first": -0.5, "three": 1.0}, name="second")
    expected = {k: -0.5 * v for k, v in updates(model, "first").items()}
    for key, update in updates(model, "second").items():
        torch.testing.assert_close(
            update, expected[key] + updates(model, "three")[key], rtol=1e-9, atol=1e-12
        )


def test_weights_of_any_kind_of_number() -> None:
    model = Net()
    tuned(model, "one")
    expected = peftlib.combine(model, {"one": 2.0}, name="float")
    for name, weight in (("int", 2), ("narrow", np.float32(2)), ("whole", np.int64(2))):
        found = peftlib.combine(model, {"one": weight}, name=name)
        assert same(
            dict(enumerate(found.state_dict().values())), dict(enumerate(expected.state_dict().values()))
        )
        assert found.combination == expected.combination


def test_an_attention_closes_when_the_last_of_them_leaves() -> None:
    model, fresh, targets, x = made("attention")
    three(model, targets)
    peftlib.combine(model, WEIGHTS)
    for tuning in reversed(list(peftlib.tunings(model).values())):
        tuning.detach()
    assert type(model.attn) is nn.MultiheadAttention
    assert list(model.state_dict()) == list(fresh.state_dict())
    assert torch.equal(model(x), fresh(x))


def test_merged_tunings_count_with_what_they_do() -> None:
    model = Net().double()
    tuned(model, "one")
    expected = updates(model, "one")
    peftlib.tunings(model)["one"].enable().merge()
    peftlib.combine(model, {"one": 2.0})
    peftlib.tunings(model)["one"].unmerge()
    for key, update in updates(model, "combined").items():
        torch.testing.assert_close(update, 2 * expected[key], rtol=1e-9, atol=1e-12)


def test_the_error_is_told_and_printed() -> None:
    model = Net().double()
    three(model, None)
    combined = peftlib.combine(model, WEIGHTS, how="svd", rank=1)
    report = combined.combination
    assert (report.how, report.weights) == ("svd", WEIGHTS)
    assert 0 < report.error < 1
    worst = max(report.errors, key=report.errors.__getitem__)
    expected = (
        f"svd of 0.5 one + -1.25 two + 2 three, relative error {report.error:.2g} "
        f"(largest {report.errors[worst]:.2g} at {worst})"
    )
    assert str(report) == expected
    assert f"combined: {expected}" in str(peftlib.summary(model))
    assert peftlib.tunings(model)["one"].combination is None
    assert peftlib.tunings(copy.deepcopy(model))["combined"].combination == report


def test_a_sum_that_cancels_out_is_zero_with_no_error() -> None:
    model = Net().double()
    tuned(model, "one")
    tuned(model, "same").load_state_dict(peftlib.tunings(model)["one"].state_dict())
    combined = peftlib.combine(model, {"one": 1.0, "same": -1.0})
    assert combined.combination.error == 0.0
    assert updates(model, "combined")["a.weight"].abs().max() < 1e-14
    nothing = tuned(model, "nothing")
    for tensor in nothing.state_dict().values():
        tensor.zero_()
    for how in HOWS:
        assert peftlib.combine(model, {"nothing": 1.0}, how=how, name=how).combination.error == 0.0


def test_under_autocast_and_inference_mode_it_is_the_same() -> None:
    model = Net()
    tuned(model, "one")
    tuned(model, "two")
    expected = peftlib.combine(model, {"one": 0.3, "two": 0.6}, rank=1, name="plain").state_dict()
    with torch.inference_mode(), torch.autocast("cpu"):
        found = peftlib.combine(model, {"one": 0.3, "two": 0.6}, rank=1)
    assert all(torch.equal(a, b) for a, b in zip(expected.values(), found.state_dict().values(), strict=True))
    peftlib.use(model, "combined")
    model(X.float()).sum().backward()


# -- refused -----------------------------------------------------------------------------------------------------------


def prepared() -> nn.Module:
    model = Net()
    tuned(model, "one")
    tuned(model, "two", LoRA(rank=1))
    return model


REFUSED: dict[str, tuple[Mapping[str, Any], type[Exception], str]] = {
    "unknown name": (
        {"weights": {"three": 1.0}},
        StateError,
        r"no tuning 'three'; it has: 'one', 'two'.*load\(\) it",
    ),
    "no weights": ({"weights": {}}, PeftlibError, "at least one; got {}"),
    "a list": ({"weights": ["one", "two"]}, PeftlibError, "needs weights {tuning name: weight}"),
    "nan": (
        {"weights": {"one": float("nan")}},
        PeftlibError,
        "weight of 'one' must be a finite number; got nan",
    ),
    "infinite": ({"weights": {"one": 1.0, "two": math.inf}}, PeftlibError, "'two' must be a finite number"),
    "no number": ({"weights": {"one": "1"}}, PeftlibError, "must be a finite number; got '1'"),
    "a bool": ({"weights": {"one": True}}, PeftlibError, "must be a finite number; got True"),
    "all zero": ({"weights": {"one": 0.0, "two": 0}}, PeftlibError, "All weights are 0"),
    "unknown how": (
        {"how": "average"},
        PeftlibError,
        "how must be one of 'linear', 'concat', 'svd', 'ties', 'dare'",
    ),
    "rank 0": ({"rank": 0}, PeftlibError, "rank must be an integer of at least 1"),
    "no rank": ({"rank": 1.5}, PeftlibError, "rank must be an integer of at least 1"),
    "rank too large": ({"rank": 7}, PeftlibError, "the largest matrix has rank 6"),
    "concat with rank": ({"how": "concat", "rank": 2}, PeftlibError, "Leave rank out, or use how='svd'"),
    "name taken": ({"name": "two"}, StateError, "has a tuning 'two' already"),
    "no name": ({"name": "a.b"}, PeftlibError, "name is a non-empty string"),
    "density of linear": ({"density": 0.5}, PeftlibError, "density is for 'ties' and 'dare' alone"),
    "density 0": ({"how": "ties", "density": 0.0}, PeftlibError, "above 0 and up to 1"),
    "density 2": ({"how": "dare", "density": 2}, PeftlibError, "above 0 and up to 1"),
    "generator": ({"how": "ties", "generator": torch.Generator()}, PeftlibError, "only 'dare' draws"),
    "overflow": (
        {"weights": {"one": 1e39}},
        PeftlibError,
        "gives values that are not finite in torch.float32",
    ),
}


@pytest.mark.parametrize("arguments, error, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_combined_leaves_the_model_alone(
    arguments: Mapping[str, Any], error: type[Exception], message: str
) -> None:
    model = prepared()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        peftlib.combine(model, **{"weights": {"one": 0.5, "two": 0.5}, **arguments})
    assert not differences(before, snapshot(model))


def test_only_modules_have_tunings() -> None:
    with pytest.raises(PeftlibError, match=r"needs an nn\.Module; got dict"):
        peftlib.combine({}, {"one": 1.0})  # type: ignore[arg-type]


@pytest.mark.parametrize("how", HOWS)
def test_weights_too_large_for_any_arithmetic_are_refused(how: str) -> None:
    model = prepared()
    before = snapshot(model)
    with pytest.raises(PeftlibError, match="not finite"):
        peftlib.combine(model, {"one": 1e308, "two": -1e308}, how=how, rank=None if how == "concat" else 1)
    assert not differences(before, snapshot(model))


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(how: str, bad: float) -> None:
    model = prepared()
    peftlib.tunings(model)["two"].state_dict()["b.lora.a"][0, 0] = bad
    before = snapshot(model)
    with pytest.raises(PeftlibError, match="not finite"):
        peftlib.combine(model, {"one": 1.0, "two": 1.0}, how=how)
    assert not differences(before, snapshot(model))


NO_SUM = {
    "adapter": (Adapter(dim=2), "which is no sum with a weight"),
    "prefix": (PrefixTuning(length=2, hidden=3), "which is no sum with a weight"),
    "prompt": (PromptTuning(length=2), "which is no sum with a weight"),
    "rows": (TokenRows(ids=[1]), "which is no sum with a weight"),
    "head": (NewHead(3), "which is no sum with a weight"),
    "dora": (LoRA(rank=1, use_dora=True), "rescales whole rows"),
    "in place": (BitFit(keep_base=False), "keep_base=False"),
}


@pytest.mark.parametrize("method, reason", NO_SUM.values(), ids=NO_SUM)
def test_what_is_no_sum_of_weights_says_so(method: Any, reason: str) -> None:
    host = HOSTS["decoder"]
    model = host.model()
    peftlib.attach(model, LoRA(rank=1), name="one")
    peftlib.attach(model, method, name="odd", example=host.example())
    before = snapshot(model)
    with pytest.raises(
        PeftlibError, match=rf"'odd' cannot be combined: at .* it has {type(method).__name__}.*{reason}"
    ):
        peftlib.combine(model, {"one": 0.5, "odd": 0.5})
    assert not differences(before, snapshot(model))


def test_moved_statistics_are_refused_and_those_that_are_not_are_not() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    one = tuned(model, "one", FullFineTuning())
    tuned(model, "two", FullFineTuning())
    peftlib.combine(model, {"one": 0.5, "two": 0.5}).detach()
    one.enable()
    model.train()(X.float())
    for enabled in (True, False):
        if not enabled:
            one.disable()
        with pytest.raises(PeftlibError, match="has moved the running statistics"):
            peftlib.combine(model, {"one": 0.5, "two": 0.5})


def test_a_base_that_is_gone_or_merged_into_is_refused() -> None:
    model = Net()
    tuned(model, "one", BitFit())
    tuned(model, "two", FullFineTuning(), ["a"])
    lora = tuned(model, "lora", LoRA(rank=1), ["a"]).enable().merge()
    with pytest.raises(PeftlibError, match="where 'lora' is merged into the base"):
        peftlib.combine(model, {"two": 1.0})
    lora.unmerge().disable()
    peftlib.attach(model, FullFineTuning(keep_base=False), name="gone")
    with pytest.raises(StateError, match="the base's value is gone"):
        peftlib.combine(model, {"one": 1.0})


def test_rank_means_nothing_where_nothing_has_one() -> None:
    model = Net()
    tuned(model, "one", BitFit())
    with pytest.raises(PeftlibError, match="none of the tunings has an update of low rank"):
        peftlib.combine(model, {"one": 1.0}, rank=1)


def test_a_tuning_without_values_is_refused() -> None:
    with torch.device("meta"):
        model = Net()
    peftlib.attach(model, LoRA(rank=1), name="one")
    with pytest.raises(PeftlibError, match="on the meta device and has no values yet"):
        peftlib.combine(model, {"one": 1.0})


# -- beside HF PEFT ----------------------------------------------------------------------------------------------------


def test_the_sum_beside_hf_peft() -> None:
    """HF's "linear" adds up A and B separately, so that what it adds to the weight is far from the sum; ours is it."""
    peft = pytest.importorskip("peft")
    width, rank = 64, 8
    base = nn.Sequential(nn.Linear(width, width))
    model = copy.deepcopy(base)
    config = peft.LoraConfig(r=rank, lora_alpha=16, target_modules=["0"])
    theirs = peft.get_peft_model(copy.deepcopy(base), config, adapter_name="one")
    theirs.add_adapter("two", config)
    layer = theirs.base_model.model[0]
    for name in ("one", "two"):
        tuning = tuned(model, name, LoRA(rank=rank, alpha=16), ["0"])
        with torch.no_grad():
            layer.lora_A[name].weight.copy_(tuning.state_dict()["0.lora.a"])
            layer.lora_B[name].weight.copy_(tuning.state_dict()["0.lora.b"])
    theirs.requires_grad_(False)
    exact = 0.5 * layer.get_delta_weight("one") + 0.5 * layer.get_delta_weight("two")
    theirs.add_weighted_adapter(["one", "two"], [0.5, 0.5], "sum", combination_type="linear")
    theirs.requires_grad_(False)
    their_error = float((layer.get_delta_weight("sum") - exact).norm() / exact.norm())
    ours = peftlib.combine(model, {"one": 0.5, "two": 0.5})
    our_error = float((updates(model, "combined")["0.weight"] - exact).norm() / exact.norm())
    print(f"relative error of the sum: HF linear {their_error:.3f}, ours {our_error:.1e}")
    assert our_error < 1e-6
    assert ours.combination.error < 1e-6
    assert their_error > 0.5


# -- with the rest of the library --------------------------------------------------------------------------------------


def test_rows_of_a_batch_are_routed_to_it() -> None:
    host = HOSTS["decoder"]
    model = host.model().eval()
    pair = Pair(host, CASES["lora"])
    for seed, name in enumerate(("one", "two")):
        nudge(pair.attach(model, name), seed=seed, size=0.3)
    peftlib.combine(model, {"one": 0.5, "two": -0.5})
    alone = {}
    for name in (None, "one", "combined"):
        peftlib.use(model, *([name] if name else []))
        alone[name] = model(*host.example())
    peftlib.use(model)
    for names in (["combined", None], ["one", "combined"]):
        with peftlib.route(model, names):
            routed = model(*host.example())
        for i, name in enumerate(names):
            torch.testing.assert_close(routed[i], alone[name][i])


def test_it_travels_in_the_hf_format(tmp_path: Any) -> None:
    host = HOSTS.get("llama") or pytest.skip("needs transformers")
    model, fresh = host.model().eval(), host.model().eval()
    tuned(model, "one", LoRA(rank=2, alpha=3), ["q_proj", "v_proj"])
    tuned(model, "two", LoRA(rank=1), ["q_proj", "down_proj"])
    combined = peftlib.combine(model, {"one": 0.5, "two": -1.0})
    peftlib.use(model, "combined")
    out = host.run(model)
    peftlib.hf.save(combined, tmp_path / "mixed")
    peftlib.hf.load(fresh, tmp_path / "mixed")
    assert close(host.run(fresh), out)
