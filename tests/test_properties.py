"""Any order of attaching, switching and leaving, held against a model that is computed by hand."""

import copy
import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import peftlib
from peftlib import Adapter, LoRA, PeftlibError

WIDTHS = st.lists(st.integers(1, 5), min_size=2, max_size=4)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])


def state(model):
    """Everything a user could notice about a model."""
    return [
        (name, type(m), sorted(m.__dict__), list(m._modules), len(m._forward_hooks), m.training)
        for name, m in model.named_modules()
    ], [(n, p.requires_grad, p.dtype, p.detach().clone()) for n, p in model.named_parameters()]


def same(a, b):
    assert a[0] == b[0]
    assert [entry[:3] for entry in a[1]] == [entry[:3] for entry in b[1]]
    assert all(torch.equal(x[3], y[3]) for x, y in zip(a[1], b[1], strict=True))


def build(widths, dtype, seed):
    torch.manual_seed(seed)
    layers = []
    for into, out in itertools.pairwise(widths):
        layers += [nn.Linear(into, out), nn.Tanh()]
    return nn.Sequential(*layers).to(dtype)


def by_hand(model, active, x):
    """The layers' own arithmetic with the active tunings' deltas added in the order they were attached."""
    for i, layer in enumerate(model):
        if not isinstance(layer, nn.Linear):
            x = torch.tanh(x)
            continue
        y = F.linear(x, layer.weight, layer.bias)
        for tuning in active:
            tensors = {
                k.rpartition(".")[2]: t for k, t in tuning.state_dict().items() if k.startswith(f"{i}.")
            }
            if "a" in tensors:
                y = y + F.linear(F.linear(x, tensors["a"]), tensors["b"])
            elif "down" in tensors:
                z = F.relu(F.linear(y, tensors["down"], tensors["down_bias"]))
                y = y + F.linear(z, tensors["up"], tensors["up_bias"])
        x = y
    return x


@given(
    WIDTHS, DTYPES, st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=12), st.integers(0, 99)
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_sequence_of_actions(widths, dtype, actions, seed):
    model = build(widths, dtype, seed)
    before = state(model)
    x = torch.randn(3, widths[0]).to(dtype)
    tunings: dict[str, peftlib.Tuning] = {}
    for action, which in actions:
        name = f"t{which}"
        if action <= 1 and name not in tunings:
            method = LoRA(rank=1) if action == 0 else Adapter(dim=2)
            tunings[name] = peftlib.attach(model, method, targets=[nn.Linear], name=name)
            with torch.no_grad():
                for p in tunings[name].parameters():
                    p.normal_()
        elif name not in tunings:
            continue
        elif action == 2:
            tunings[name].disable()
        elif action == 3:
            tunings[name].enable()
        elif action == 4:
            peftlib.use(model, name)
        elif action == 5:
            tunings.pop(name).detach()
        assert list(peftlib.tunings(model)) == list(tunings)
        active = [t for t in tunings.values() if t.enabled]
        torch.testing.assert_close(model(x), by_hand(model, active, x))
        assert all(not p.requires_grad for m in model for p in m._parameters.values()) == bool(tunings)
    # A copy leads a life of its own.
    twin = copy.deepcopy(model)
    for tuning in list(peftlib.tunings(twin).values()):
        tuning.detach()
    same(state(twin), before)
    for tuning in reversed(list(tunings.values())):
        tuning.detach()
    same(state(model), before)


@given(st.integers(-2, 9), st.integers(1, 6), st.integers(1, 6), DTYPES)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_rank_fits_or_is_refused(rank, into, out, dtype):
    model = nn.Sequential(nn.Linear(into, out)).to(dtype)
    before = state(model)
    x = torch.randn(2, into).to(dtype)
    expected = model(x)
    try:
        tuning = peftlib.attach(model, LoRA(rank=rank), targets=["0"])
    except PeftlibError:
        assert rank < 1 or rank > min(into, out)
    else:
        assert 1 <= rank <= min(into, out)
        assert tuning.num_parameters == rank * (into + out)
        assert {p.dtype for p in tuning.parameters()} == {dtype}
        assert torch.equal(model(x), expected)
        tuning.detach()
    same(state(model), before)


@given(st.lists(st.sampled_from(["0", "2", "*", "!0", "!2", "4", "layers.0"]), min_size=1, max_size=3))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_targets_match_or_are_refused(targets):
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    before = state(model)
    included = {t for t in targets if not t.startswith("!")}
    wanted = {n for n in ("0", "2") if not included or n in included or "*" in included} - {
        t[1:] for t in targets if t.startswith("!")
    }
    try:
        tuning = peftlib.attach(model, LoRA(rank=1), targets=targets)
    except PeftlibError:
        # A target without a match, or one that the exclusions leave nothing of.
        excluded = {t[1:] for t in targets if t.startswith("!")}
        assert included & {"4", "layers.0"} or not wanted or included & excluded
    else:
        assert set(tuning.sites) == wanted
        tuning.detach()
    same(state(model), before)
