"""One batch, many tunings: every row must be what its own tuning makes of it alone, gradients included."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import peftlib
from peftlib import (
    Adapter,
    BitFit,
    FullFineTuning,
    LoRA,
    NewHead,
    PeftlibError,
    PrefixTuning,
    PromptTuning,
    PTuningV1,
    PTuningV2,
    TokenRows,
)
from peftlib.errors import ProbeError, StateError, TargetError
from tests.twin import assert_untouched, classes, snapshot
from tests.zoo import PAIRS, nudge

ROWS = 4


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attn = Attention(width, 2)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        x = x + self.attn(x)
        return x + self.down(F.gelu(self.up(x)))


class Decoder(nn.Module):
    def __init__(self, width=8, checkpointed=False):
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, 11)
        self.checkpointed = checkpointed

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.head(x)


def decoder(**kwargs):
    torch.manual_seed(0)
    return Decoder(**kwargs).double()


def tokens(rows=ROWS, length=6):
    return torch.randint(0, 11, (rows, length), generator=torch.Generator().manual_seed(1))


def put(model, methods, **kwargs):
    """A tuning for each name, none of them at its start."""
    tunings = {}
    for i, (name, (method, targets)) in enumerate(methods.items()):
        tunings[name] = peftlib.attach(model, method, targets=targets, name=name, **kwargs)
        nudge(tunings[name], seed=i)
    peftlib.use(model)
    return tunings


METHODS = {
    "lora": (LoRA(rank=2, alpha=5), ["qkv", "out", "down"]),
    "wider": (LoRA(rank=3), ["qkv", "up"]),
    "embedding": (LoRA(rank=2), ["embed", "up"]),
    "dora": (LoRA(rank=2, use_dora=True), ["out", "up"]),
    "sliced": (LoRA(rank=2, rows=[(0, 8), (16, 24)]), ["qkv"]),
    "adapter": (Adapter(dim=3), None),
    "normed": (Adapter(dim=3, layer_norm=True, activation="gelu"), ["attn"]),
    "parallel": (Adapter(dim=2, placement="parallel", scale=4.0), ["up"]),
    "both": ({"down": LoRA(rank=1), "blocks.0": Adapter(dim=2), "attn": PTuningV2(length=1)}, None),
    "prefix": (PrefixTuning(length=3, hidden=4), None),
    "longer": (PTuningV2(length=5), None),
    "other-mlp": (PrefixTuning(length=2, hidden=4, init=[1, 2, 3]), None),
    "second-mlp": (PrefixTuning(length=5, hidden=4), None),
}


@pytest.fixture(scope="module")
def many():
    model = decoder()
    put(model, METHODS, example=tokens())
    return model


def alone(model, names, ids, batch_dim=0):
    """Each row by itself, through its own tuning."""
    rows = []
    for i, name in enumerate(names):
        with peftlib.use(model, *([name] if name else [])):
            rows.append(model(ids.narrow(batch_dim, i, 1)))
    return torch.cat(rows, batch_dim)


def gradients(model, out):
    weight = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(2))
    named = {
        f"{n}.{k}": p
        for n, t in peftlib.tunings(model).items()
        for k, p in t.named_parameters()
        if p.requires_grad
    }
    if not out.requires_grad:
        return {}
    found = torch.autograd.grad(out, list(named.values()), weight, allow_unused=True)
    return {k: g for k, g in zip(named, found, strict=True) if g is not None and g.any()}


def assert_routed(model, names, ids, batch_dim=0):
    expected = alone(model, names, ids, batch_dim)
    wanted = gradients(model, expected)
    with peftlib.route(model, names, batch_dim=batch_dim):
        out = model(ids)
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-10)
        got = gradients(model, out)
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(
            got[key], value, rtol=1e-8, atol=1e-10, msg=lambda m, key=key: f"{key}: {m}"
        )
    with torch.no_grad(), peftlib.route(model, names, batch_dim=batch_dim):
        # Twice, for the second time takes what the first has kept.
        for _ in range(2):
            torch.testing.assert_close(model(ids), expected.detach(), rtol=1e-9, atol=1e-10)


@settings(max_examples=25)
@given(names=st.lists(st.sampled_from([None, *METHODS]), min_size=1, max_size=7), length=st.integers(1, 7))
def test_rows_equal_what_their_tunings_make_of_them_alone(many, names, length):
    assert_routed(many, names, tokens(len(names), length))


def test_every_method_in_one_batch(many):
    assert_routed(many, [*METHODS, None, "lora"], tokens(len(METHODS) + 2))


@pytest.mark.parametrize("name", METHODS)
def test_one_tuning_for_all_rows_is_that_tuning(many, name):
    ids = tokens()
    with peftlib.use(many, name):
        expected = many(ids)
    with peftlib.route(many, [name] * ROWS):
        torch.testing.assert_close(many(ids), expected, rtol=1e-9, atol=1e-10)


def test_rows_of_the_base_alone_are_the_base(many):
    ids = tokens()
    with peftlib.use(many):
        expected = many(ids)
    with peftlib.route(many, [None] * ROWS):
        assert torch.equal(many(ids), expected)


def routable():
    turn = 0
    for pair in PAIRS:
        if pair.case.dropout or pair.case.name in (
            "full",
            "partial",
            "bitfit",
            "lora-parameter",
            "lora-and-head",
        ):
            continue
        if pair.host.name == "encoder-padded" and pair.case.place in ("linear", "module", "beside"):
            continue  # nested tensors, which are refused
        if pair.host.dtype in (torch.bfloat16, torch.float16) or pair.host.name == "conv-training":
            continue  # too coarse to compare; or batch norms in training, which make one row of the others
        turn += 1
        yield pytest.param(pair, id=str(pair), marks=() if turn % 3 == 0 else pytest.mark.slow)


@pytest.mark.parametrize("pair", list(routable()))
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_routing_on_the_zoo(pair):
    pair = dataclasses.replace(pair, host=dataclasses.replace(pair.host, dtype=torch.float64))
    model, inputs = pair.host.model(), pair.host.example()
    for i, name in enumerate("ab"):
        nudge(pair.attach(model, name), seed=10 + i)
        peftlib.use(model)
    first = next(iter(inputs.values())) if isinstance(inputs, dict) else inputs[0]
    batch_dim = 1 if pair.host.name in ("transformer", "encoder-training") else 0
    rows = first.shape[batch_dim]
    names = ["ab"[i % 2] for i in range(rows)]
    if pair.case.name not in ("prompt", "ptuning-v1", "head"):
        names[-1] = None
    expected = {}
    for name in dict.fromkeys(names):
        with peftlib.use(model, *([name] if name else [])):
            expected[name] = pair.host.run(model, inputs)
    with peftlib.route(model, names, batch_dim=batch_dim):
        routed = pair.host.run(model, inputs)
    compared = 0
    for path, value in routed.items():
        axis = batch_dim if value.dim() > batch_dim and value.shape[batch_dim] == rows else 0
        if value.dim() == 0 or value.shape[axis] != rows:
            continue
        for i, name in enumerate(names):
            compared += 1
            torch.testing.assert_close(
                value.select(axis, i), expected[name][path].select(axis, i), rtol=1e-9, atol=1e-9
            )
    assert compared >= rows


@pytest.mark.parametrize("method", [PromptTuning(length=3), PTuningV1(length=3, hidden=4)])
def test_prompts_of_one_length(method):
    model, ids = decoder(), tokens()
    put(model, dict.fromkeys("ab", (method, None)), example=ids)
    assert_routed(model, ["b", "a", "a", "b"], ids)


def test_prompts_of_hidden_states_time_first():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double()
    x = torch.randn(5, 3, 8, dtype=torch.float64)
    put(
        model,
        {"a": (PromptTuning(length=2), ""), "b": (PromptTuning(length=2), "")},
        example=x,
    )
    assert_routed(model, ["b", "a", "b"], x, batch_dim=1)


def test_a_prompt_beside_a_lora_in_each_tuning():
    model, ids = decoder(), tokens()
    mixed = {"": PromptTuning(length=2), "embed": LoRA(rank=2), "down": LoRA(rank=2)}
    other = {"": PromptTuning(length=2), "up": Adapter(dim=2)}
    put(model, {"a": (mixed, None), "b": (other, None)}, example=ids)
    assert_routed(model, ["b", "a", "a", "b"], ids)


def test_placeholders_in_a_template_and_rows_of_the_base():
    model, ids = decoder(), tokens()
    method = PTuningV1(length=2, hidden=4, placeholder_id=11)
    put(model, dict.fromkeys("ab", (method, None)), example=ids)
    ids[:3, 2:4] = 11
    assert_routed(model, ["b", "a", "b", None], ids)


def test_heads_of_their_own():
    model, ids = decoder(), tokens()
    put(model, {n: (LoRA(rank=2, head=NewHead(3)), ["up"]) for n in "ab"}, example=ids)
    assert_routed(model, ["b", "a", "a", "b"], ids)


def test_time_first():
    class TimeFirst(Decoder):
        def forward(self, ids):
            return super().forward(ids.T).transpose(0, 1)

    torch.manual_seed(0)
    inner = TimeFirst().double()
    put(inner, {k: METHODS[k] for k in ("lora", "dora", "adapter", "prefix")}, example=tokens().T)
    # As many rows as positions, so that sizes do not tell.
    assert_routed(
        inner, ["lora", "prefix", None, "adapter", "dora", "lora"], tokens(6, 6).T.contiguous(), batch_dim=1
    )


def test_convolutions():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1, padding_mode="circular"),
        nn.ReLU(),
        nn.Conv2d(4, 6, 1, groups=2),
    ).double()
    put(
        model,
        {
            "a": (LoRA(rank=2), ["0", "2"]),
            "b": (LoRA(rank=1, use_dora=True), ["2"]),
            "c": (Adapter(dim=2), ["0"]),
        },
    )
    assert_routed(model, ["a", "c", None, "b", "a"], torch.randn(5, 3, 6, 6, dtype=torch.float64))


def test_single_tokens_and_vectors():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    put(model, {"a": (LoRA(rank=2), ["0", "2"]), "b": (Adapter(dim=2), ["0"])})
    assert_routed(model, ["b", "a", None], torch.randn(3, 4, dtype=torch.float64))
    assert_routed(model, ["b"], torch.randn(1, 4, dtype=torch.float64))


def test_each_row_drops_for_itself():
    model, ids = decoder(), tokens(400, 5)
    method = LoRA(rank=2, dropout=0.25)
    put(model, {n: (method, ["down"]) for n in "ab"})
    model.train()
    seen = []
    handle = model.blocks[1].down.register_forward_hook(lambda m, i, out: seen.append(out.detach()))
    names = ["a", "b"] * 200
    with peftlib.route(model, names):
        seen.clear()
        torch.manual_seed(3)
        first = model(ids)
        torch.manual_seed(3)
        assert torch.equal(model(ids), first)
        assert not torch.equal(model(ids), first)
    model.eval()
    handle.remove()
    exact = alone(model, names, ids)
    assert (first - exact).mean().abs() < 0.05  # unbiased up to the nonlinearities


def test_checkpoints_recompute_within_the_context():
    names = ["lora", None, "adapter", "prefix"]
    results = []
    for checkpointed in (False, True):
        model = decoder(checkpointed=checkpointed)
        put(model, {k: METHODS[k] for k in ("lora", "adapter", "prefix")}, example=tokens())
        with peftlib.route(model, names):
            out = model(tokens())
            results.append({"out": out.detach(), **gradients(model, out)})
    assert results[0].keys() == results[1].keys()
    for key, value in results[0].items():
        assert torch.equal(results[1][key], value), key


@pytest.mark.parametrize(
    "names", [["lora", "wider", None], ["adapter", "dora", "prefix"], ["longer", "prefix", None]]
)
def test_one_graph_for_the_compiler(many, names):
    ids = tokens(3)
    torch._dynamo.reset()
    with peftlib.route(many, names, example=ids):
        expected = many(ids)
        compiled = torch.compile(many, fullgraph=True, backend="aot_eager")(ids)
    torch.testing.assert_close(compiled, expected)


def test_training_on_routed_batches_changes_what_is_kept():
    model, ids = decoder(), tokens()
    tunings = put(model, {k: METHODS[k] for k in ("lora", "wider", "adapter", "prefix")}, example=ids)
    names = list(tunings)
    optimizer = torch.optim.SGD([p for t in tunings.values() for p in t.parameters()], lr=1e-3)
    with peftlib.route(model, names):
        for _ in range(3):
            with torch.no_grad():
                before = model(ids)
            optimizer.zero_grad()
            model(ids).square().mean().backward()
            optimizer.step()
        with torch.no_grad():
            after = model(ids)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, alone(model, names, ids).detach())


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "method", [LoRA(rank=2), Adapter(dim=2), PTuningV2(length=2), PrefixTuning(length=2, hidden=4)]
)
def test_the_number_of_operations_does_not_grow_with_the_number_of_tunings(method):
    model, ids = decoder(), tokens(12)
    put(model, {f"t{i}": (method, None) for i in range(12)}, example=ids)
    counts = []
    for different in (2, 12):
        with peftlib.route(model, [f"t{i % different}" for i in range(12)]):
            model(ids)  # learns the axes
            with Operations() as seen:
                model(ids)
        seen.count.pop(torch.ops.aten.permute.default, None)  # a view of each b
        counts.append(seen.count.total())
    # Fewer, for there is nothing to gather where every row has a tuning of its own.
    assert counts[1] <= counts[0]


def test_names_and_flags_return_to_what_they_were(many):
    model = copy.deepcopy(many)
    peftlib.use(model, "lora", "adapter")
    before, kinds = snapshot(model), classes(model)
    expected = model(tokens())
    with peftlib.route(model, ["wider", None, "lora", "lora"]):
        model(tokens())
    assert [n for n, t in peftlib.tunings(model).items() if t.enabled] == ["lora", "adapter"]
    assert torch.equal(model(tokens()), expected)
    assert_untouched(model, before, kinds)
    assert not model._forward_pre_hooks
    assert not any("_peft_route" in m.__dict__ for m in model.modules())
    with pytest.raises(ZeroDivisionError), peftlib.route(model, ["wider"]):
        raise ZeroDivisionError
    assert torch.equal(model(tokens()), expected)
    for tuning in list(peftlib.tunings(model).values()):
        tuning.detach()
    assert not any(k.startswith("_peft") for m in model.modules() for k in m.__dict__)


def test_a_failed_call_leaves_the_context_usable(many):
    model = copy.deepcopy(many)
    with peftlib.route(model, ["lora", None]):
        with pytest.raises(Exception):  # noqa: B017 (whatever the model raises)
            model(torch.rand(2, 3))
        out = model(tokens(2))
    torch.testing.assert_close(out, alone(model, ["lora", None], tokens(2)))


@pytest.mark.parametrize(
    "names, error, message",
    [
        ([], PeftlibError, "a name or None for each row"),
        ("lora", PeftlibError, "a name or None for each row"),
        (["nobody"], StateError, "no tuning 'nobody'; it has: 'lora'"),
    ],
)
def test_names_are_checked(many, names, error, message):
    with pytest.raises(error, match=message):
        peftlib.route(many, names)


def test_a_batch_of_another_size(many):
    model = copy.deepcopy(many)
    with (
        peftlib.route(model, ["lora", "wider"]),
        pytest.raises(PeftlibError, match="route has 2 names, and the inputs have 4 rows on axis 0"),
    ):
        model(tokens())
    with peftlib.route(model, ["prefix", "longer"]), pytest.raises(PeftlibError, match="route has 2 names"):
        model(tokens())


@pytest.mark.parametrize(
    "method, targets, why",
    [
        (FullFineTuning(), ["head"], "FullFineTuning at 'head': it exchanges values of the base"),
        (BitFit(), None, "BitFit at .*: it exchanges values of the base"),
        (LoRA(rank=2), ["up.weight"], "LoRA at .*up.weight': it changes a weight itself"),
        (TokenRows(ids=[1, 2]), None, "TokenRows at 'embed': it changes what all rows"),
    ],
)
def test_what_all_rows_share_is_refused(method, targets, why):
    model = decoder()
    put(model, {"a": (method, targets), "b": (LoRA(rank=2), None)})
    before, kinds = snapshot(model), classes(model)
    with pytest.raises(PeftlibError, match=f"'a' cannot be routed: {why}"), peftlib.route(model, ["b", "a"]):
        raise AssertionError("never entered")
    assert_untouched(model, before, kinds)
    # It may be on the model as long as no row takes it.
    assert_routed(model, ["b", None, "b"], tokens(3))


def test_prompts_that_not_all_rows_have_or_of_two_lengths_are_refused():
    model, ids = decoder(), tokens()
    put(
        model,
        {"a": (PromptTuning(length=2), None), "b": (PromptTuning(length=3), None), "c": (LoRA(rank=2), None)},
        example=ids,
    )
    for names in (["a", None], ["a", "c"], ["b", "a"]):
        with pytest.raises(PeftlibError, match="changes the whole batch"), peftlib.route(model, names):
            raise AssertionError("never entered")
    assert_routed(model, ["b", "b"], tokens(2))


class Folded(nn.Module):
    """A linear that sees (B·T, D) or (T·B, D), one that sees (B, T, D), and windows of two positions."""

    def __init__(self, time_first=False):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.time_first = time_first

    def forward(self, x):
        y = x.transpose(0, 1) if self.time_first else x
        y = self.a(y.flatten(0, 1)).view_as(y)
        y = self.b(y.transpose(0, 1) if self.time_first else y)
        return self.c(y.unflatten(1, (-1, 2)).flatten(0, 1)).view_as(y)


FOLDED = {
    "a": (LoRA(rank=2), None),
    "b": (LoRA(rank=2), ["b"]),
    "c": (Adapter(dim=2), ["a", "c"]),
    "d": (LoRA(rank=1, use_dora=True), ["a"]),
}


@pytest.mark.parametrize("time_first", [False, True])
@pytest.mark.parametrize("rows", [2, 3, 5])
def test_rows_folded_into_another_axis(time_first, rows):
    torch.manual_seed(0)
    model = Folded(time_first).double()
    put(model, FOLDED)
    x = torch.randn(rows, 4, 4, dtype=torch.float64)
    assert_routed(model, ["c", "a", "d", None, "b"][:rows], x)
    # Known from now on, for any number of rows and length.
    assert_routed(model, ["c", None, "d", "a"], torch.randn(4, 6, 4, dtype=torch.float64))
    assert_routed(model, ["c"], torch.randn(1, 6, 4, dtype=torch.float64))
    assert model.training


def test_an_order_that_the_example_does_not_show_is_refused():
    x = torch.randn(3, 4, 4)
    for names, batch, model, error, why in (
        (["a"], x[:1], Folded(), ProbeError, "folded into one axis .* two rows or more"),
        (["a"] * 3, torch.ones(3, 4, 4), Folded(), TargetError, "does not show .its rows must differ"),
        (["a"] * 3, x, Folded().to("meta"), ProbeError, "a model with values"),
    ):
        put(model, FOLDED)
        with peftlib.route(model, names), pytest.raises(error, match=why):
            model(batch.to(model.a.weight.device))
        assert not model._forward_hooks


def test_what_all_rows_pass_through_together_is_refused():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.positions, self.out = nn.Embedding(9, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.out(x + self.positions(torch.arange(x.shape[1])))

    model = Shared()
    put(model, {"a": (LoRA(rank=2), ["positions"])})
    with (
        peftlib.route(model, ["a", None]),
        pytest.raises(TargetError, match=r"'positions' .* all rows share it"),
    ):
        model(torch.randn(2, 3, 4))


def test_a_part_called_by_itself_needs_the_axes(many):
    model = copy.deepcopy(many)
    model.__dict__.pop("_peft_axes", None)
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    with peftlib.route(model, ["lora", None]), pytest.raises(PeftlibError, match="called by itself"):
        model.blocks[0](x)
    with peftlib.route(model, ["lora", None], example=tokens()):
        routed = model.blocks[0](x)
    with peftlib.use(model, "lora"):
        torch.testing.assert_close(routed[0], model.blocks[0](x)[0])
    with peftlib.use(model):
        torch.testing.assert_close(routed[1], model.blocks[0](x)[1])


def test_an_example_without_that_axis_and_one_that_cannot_grow():
    model = nn.Sequential(nn.Linear(4, 4))
    put(model, {"a": (LoRA(rank=2), None)})
    with (
        pytest.raises(ProbeError, match="no tensor with an axis 2"),
        peftlib.route(model, ["a"], batch_dim=2, example=torch.randn(3, 4)),
    ):
        raise AssertionError("never entered")

    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            return self.a(x.view(3, 4))

    model = Fixed()
    put(model, {"a": (LoRA(rank=2), None)})["a"].enable()
    with (
        pytest.raises(ProbeError, match="does not run with 4 rows"),
        peftlib.route(model, ["a"] * 3, example=torch.randn(3, 4)),
    ):
        raise AssertionError("never entered")
    assert model.a._peft_active != ()  # enabled as before
    assert peftlib.tunings(model)["a"].attached


def test_within_a_route_nothing_else_may_change_what_runs(many):
    model = copy.deepcopy(many)
    tuning = peftlib.tunings(model)["lora"]
    with peftlib.route(model, ["lora", None]):
        for act in (
            tuning.enable,
            tuning.disable,
            tuning.detach,
            tuning.merge,
            lambda: peftlib.use(model, "wider"),
        ):
            with pytest.raises(StateError, match=r"within peftlib.route"):
                act()
        with pytest.raises(StateError, match=r"within peftlib.route"):
            peftlib.attach(model, LoRA(rank=1), name="new")
        with pytest.raises(StateError, match="in a route already"), peftlib.route(model, ["lora", None]):
            raise AssertionError("never entered")
        assert len(list(tuning.parameters())) == 12
        assert tuning.state_dict()
    tuning.enable().merge()
    with pytest.raises(StateError, match="'lora' is merged"), peftlib.route(model, ["wider"]):
        raise AssertionError("never entered")


def test_a_host_that_changes_its_input_in_place():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4))
    put(model, {"a": (Adapter(dim=2, placement="parallel"), ["1"])}, example=torch.randn(2, 4))
    with (
        peftlib.route(model, ["a", None]),
        pytest.raises(PeftlibError, match="'1' changes its input in place"),
    ):
        model(torch.randn(2, 4))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_are_refused():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval()
    put(model, {"a": (LoRA(rank=2), ["linear1"])})
    padding = torch.tensor([[False, False, True], [False, False, False]])
    with (
        peftlib.route(model, ["a", None]),
        pytest.raises(PeftlibError, match=r"nested tensor.*enable_nested_tensor=False"),
    ):
        model(torch.randn(2, 3, 8), src_key_padding_mask=padding)


class Remembering(nn.Linear):
    """Answers with a tensor that it keeps."""

    def forward(self, x):
        self.last = super().forward(x)
        return self.last


@pytest.mark.parametrize("grad", [False, True])
def test_an_output_that_others_hold_is_left_as_it_is(grad):
    torch.manual_seed(0)
    model = nn.Sequential(Remembering(4, 4)).double()
    put(model, {name: (LoRA(rank=1), None) for name in "ab"})
    x = torch.randn(ROWS, 3, 4, dtype=torch.float64)
    plain = model(x)
    with peftlib.route(model, ["a", "b", None, "a"], example=x), torch.set_grad_enabled(grad):
        assert not torch.equal(model(x), plain)
    assert torch.equal(model[0].last, plain)


def test_without_gradients_the_update_is_added_where_the_output_lies():
    model = nn.Sequential(nn.Linear(4, 4))
    put(model, {name: (LoRA(rank=1), None) for name in "ab"})
    x = torch.randn(ROWS, 3, 4)
    with peftlib.route(model, ["a", "b", None, "a"], example=x):
        trained = model(x)
        with torch.no_grad(), Operations() as seen:
            torch.testing.assert_close(model(x), trained)
    assert seen.count[torch.ops.aten.baddbmm_.default] == 1
    assert not seen.count[torch.ops.aten.baddbmm.default]


def test_generation_with_a_cache():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).double().eval()
    ids = torch.randint(2, 50, (4, 5))
    put(
        model,
        {
            "lora": (LoRA(rank=2), None),
            "adapter": (Adapter(dim=4), None),
            "prefix": (PTuningV2(length=2), None),
        },
        example={"input_ids": ids},
    )
    names = ["lora", None, "prefix", "adapter"]
    options = {"max_new_tokens": 6, "do_sample": False}
    with peftlib.route(model, names):
        together = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    for i, name in enumerate(names):
        with peftlib.use(model, *([name] if name else [])):
            one = model.generate(ids[i : i + 1], attention_mask=torch.ones(1, 5, dtype=torch.long), **options)
        assert torch.equal(together[i], one[0]), name
    assert len({tuple(row[5:].tolist()) for row in together}) > 1


def test_prefixes_as_hf_has_them_move_the_positions_of_their_rows():
    transformers = pytest.importorskip("transformers")
    from peftlib.hf import PositionOffset

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).double().eval()
    ids = torch.randint(2, 50, (4, 5))
    both = lambda length: {"model": PTuningV2(length=length), "": PositionOffset(length)}  # noqa: E731
    put(
        model,
        {"short": (both(2), None), "long": (both(5), None), "lora": (LoRA(rank=2), None)},
        example={"input_ids": ids},
    )
    names = ["long", "lora", "short", None]
    with peftlib.route(model, names):
        together = model(input_ids=ids).logits
    for i, name in enumerate(names):
        with peftlib.use(model, *([name] if name else [])):
            torch.testing.assert_close(together[i : i + 1], model(input_ids=ids[i : i + 1]).logits)


# -- rows that are not where sizes say they are ------------------------------------------------------------------------


class Sorting(nn.Module):
    """Sorts its rows by length inside, as packed sequences want them, and puts them back."""

    def __init__(self):
        super().__init__()
        self.lin, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x, lengths):
        lengths, index = lengths.sort(descending=True)
        return self.out(self.lin(x[index])[index.argsort()])


def test_rows_in_another_order_inside_are_refused():
    model = Sorting()
    put(model, {"a": (LoRA(rank=2), ["lin"]), "b": (LoRA(rank=2), ["out"])})
    call = torch.randn(3, 5, 4), torch.tensor([2, 5, 3])
    with pytest.raises(TargetError, match="'lin' does not see the rows of the batch in their order"):
        peftlib.route(model, ["a", None, "b"], example=call).__enter__()
    with peftlib.use(model, "b"):
        expected = model(*call)
    with peftlib.route(model, ["b", None, "b"], example=call):
        torch.testing.assert_close(model(*call)[::2], expected[::2])


def test_rows_alike_are_routed_and_their_order_looked_at_once_they_differ():
    model = Sorting()
    put(model, {"a": (LoRA(rank=2), ["lin"])})
    alike = torch.randn(1, 5, 4).expand(3, -1, -1), torch.tensor([4, 4, 4])
    with peftlib.route(model, ["a", None, "a"], example=alike):
        model(*alike)
        with pytest.raises(TargetError, match="'lin' does not see the rows"):
            model(torch.randn(3, 5, 4), torch.tensor([2, 5, 3]))


class Cached(nn.Module):
    """Keeps what it saw in the caller's object, in its own buffer and in itself."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.log = []

    def forward(self, x, cache):
        self.calls.add_(1)
        self.log.append(len(x))
        h = self.lin(x.reshape(-1, 4)).view_as(x)
        cache.h = h if cache.h is None else torch.cat([cache.h, h], 1)
        return cache.h


class Cache:
    h = None


def test_learning_leaves_caches_buffers_and_the_models_own_state_alone():
    model, cache = Cached(), Cache()
    put(model, {"a": (LoRA(rank=2), None)})
    with peftlib.route(model, ["a", None]):
        model(torch.randn(2, 4, 4), cache)
        assert cache.h.shape == (2, 4, 4)
        model(torch.randn(2, 1, 4), cache)  # with a filled cache: as the first call showed
        assert cache.h.shape == (2, 5, 4)
    assert model.calls == 2
    assert model.log == [2, 2]
    assert model.training


def test_a_tuning_of_a_part_stays_and_acts_on_all_rows():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 2)).double()
    inner = peftlib.attach(model[0], LoRA(rank=2), targets=["0"], name="inner")
    nudge(inner)
    put(model, {"a": (LoRA(rank=2), ["0.0", "1"]), "b": (Adapter(dim=2), ["0.0"])})
    x = torch.randn(3, 4, dtype=torch.float64)
    before = model(x)
    expected = alone(model, ["a", "b", None], x)
    with peftlib.route(model, ["a", "b", None]):
        torch.testing.assert_close(model(x), expected)
        with pytest.raises(StateError, match=r"within peftlib.route"):
            inner.disable()
    assert inner.enabled
    assert torch.equal(model(x), before)
    between = peftlib.attach(model, LoRA(rank=1), targets=["0.0"], name="c")
    between.disable()
    late = peftlib.attach(model[0], LoRA(rank=1), targets=["0"], name="late")
    after = peftlib.attach(model, LoRA(rank=1), targets=["0.0"], name="d")
    after.disable()
    with pytest.raises(StateError, match="attached to a part of the model, between"):
        peftlib.route(model, ["c", "d", None]).__enter__()
    late.detach()
    assert_routed(model, ["c", "d", None], x)


def test_a_layout_that_a_switch_changes_is_learned_for_each():
    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x, time_first=False):
            return self.lin(x.transpose(0, 1)).transpose(0, 1) if time_first else self.lin(x)

    torch.manual_seed(0)
    model = Either().double()
    put(model, {"a": (LoRA(rank=2), None)})
    x = torch.randn(3, 3, 4, dtype=torch.float64)
    expected = alone(model, ["a", None, "a"], x)
    with peftlib.route(model, ["a", None, "a"]):
        for time_first in (False, True, False):
            torch.testing.assert_close(model(x, time_first=time_first), expected)


def test_what_was_learned_of_a_model_is_not_taken_for_its_parts():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.enc = nn.Sequential(nn.Linear(4, 4))

        def forward(self, x):
            return self.enc(x.transpose(0, 1)).transpose(0, 1)

    torch.manual_seed(0)
    model = Outer().double()
    put(model, {"a": (LoRA(rank=2), None)})
    x = torch.randn(3, 3, 4, dtype=torch.float64)
    assert_routed(model, ["a", None, "a"], x)
    put(model.enc, {"b": (LoRA(rank=2), None)})
    assert_routed(model.enc, ["b", None, "b"], x)


def test_a_tensor_that_may_be_shared_or_have_rows_is_asked_about():
    class Memory(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.mem = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, memory, unused=None):
            return self.lin(x) + self.mem(memory).mean(0)

    torch.manual_seed(0)
    model = Memory().double()
    put(model, {"a": (LoRA(rank=2), ["mem"]), "b": (LoRA(rank=2), ["lin"])})
    x, memory = torch.randn(3, 5, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    with (
        peftlib.route(model, ["a", None, "a"]),
        pytest.raises(ProbeError, match=r"shared by all of them.*'mem'"),
    ):
        model(x, memory)
    with pytest.raises(TargetError, match=r"'mem' works on .* all rows share it"):
        peftlib.route(model, ["a", None, "a"], example=(x[:2], memory)).__enter__()
    expected = torch.cat([model(x[i : i + 1], memory) for i in range(3)])
    with peftlib.use(model, "b"):
        expected[1] = model(x[1:2], memory)[0]
    with peftlib.route(model, [None, "b", None]):
        torch.testing.assert_close(model(x, memory, unused=torch.randn(3)), expected)


def test_an_example_teaches_anew():
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.lin = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, extra=None):
            y = self.up(x.flatten(0, 1)).view_as(x)
            return y if extra is None else y + self.lin(extra)

    torch.manual_seed(0)
    model = Optional().double()
    put(model, {"a": (LoRA(rank=2), None)})
    x = torch.randn(3, 1, 4, dtype=torch.float64)
    with peftlib.route(model, ["a", None, "a"]):
        model(x)  # one position: folded rows look like plain ones, and lin does not run
        with pytest.raises(PeftlibError, match=r"has 15 rows on axis 0 .* pass route\(..., example=\)"):
            model(torch.randn(3, 5, 4, dtype=torch.float64))
    longer = torch.randn(3, 5, 4, dtype=torch.float64)
    with peftlib.use(model, "a"):
        expected = model(longer, longer)
    with peftlib.route(model, ["a", None, "a"], example=(longer, longer)):
        torch.testing.assert_close(model(longer, longer)[::2], expected[::2])


def test_kept_factors_follow_every_change_of_their_values():
    torch.manual_seed(0)
    model = decoder()
    ids = tokens()
    tunings = put(model, {k: METHODS[k] for k in ("lora", "adapter", "longer", "second-mlp")}, example=ids)
    names = [*tunings]
    with torch.no_grad(), peftlib.route(model, names):
        seen = [model(ids)]
        for change in (
            lambda p: p.mul_(2),
            lambda p: setattr(p, "data", torch.randn_like(p)),  # as an average of weights is swapped in
        ):
            for tuning in tunings.values():
                for parameter in tuning.parameters():
                    change(parameter)
            seen.append(model(ids))
            for row in range(len(names)):
                assert not torch.allclose(seen[-1][row], seen[-2][row])
    torch.testing.assert_close(seen[-1], alone(model, names, ids).detach())


def test_reentrant_checkpoints_work_as_without_a_route():
    class Reentrant(Decoder):
        def forward(self, x):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=True)
            return self.head(x)

    torch.manual_seed(0)
    model = Reentrant().double()
    put(model, {"a": (LoRA(rank=2), ["up"])})
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    expected = alone(model, ["a", None], x)
    wanted = gradients(model, expected)
    with peftlib.route(model, ["a", None]):
        out = model(x)
        torch.testing.assert_close(out, expected)
        got = gradients(model, out)
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(got[key], value)


def test_the_number_of_names_is_checked_whatever_they_are(many):
    for names in (["lora"] * 2, [None] * 2, ["lora", None]):
        with (
            peftlib.route(many, names),
            pytest.raises(PeftlibError, match="route has 2 names, and the inputs have 4"),
        ):
            many(tokens())


def test_an_export_within_a_route_is_refused(many):
    with peftlib.route(many, ["lora"]), pytest.raises(StateError, match=r"within peftlib.route"):
        peftlib.merged_state_dict(many)


def test_windows_cannot_have_a_prefix_each():
    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = Attention(8, 2)

        def forward(self, x):
            return self.attn(x.unflatten(1, (-1, 2)).flatten(0, 1)).view_as(x)

    model = Windows()
    x = torch.randn(3, 4, 8)
    put(model, {"a": (PTuningV2(length=2), None)}, example=x)
    with peftlib.route(model, ["a", None, "a"]), pytest.raises(PeftlibError, match="not on the first axis"):
        model(x)


def test_encoder_decoders_generate_with_an_example():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).double().eval()
    ids = torch.randint(2, 40, (3, 5))
    put(model, {"a": (LoRA(rank=2), ["q", "v"]), "b": (Adapter(dim=2), None)})
    names, options = ["a", None, "b"], {"max_new_tokens": 4, "do_sample": False}
    example = {"input_ids": ids, "decoder_input_ids": ids[:, :2]}
    with peftlib.route(model, names, example=example):
        together = model.generate(ids, **options)
    for i, name in enumerate(names):
        with peftlib.use(model, *([name] if name else [])):
            one = model.generate(ids[i : i + 1], **options)
        assert torch.equal(together[i, : one.shape[1]], one[0])
