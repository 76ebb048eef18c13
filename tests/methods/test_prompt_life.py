"""Prompts in company and in use: several on one model, beside other methods, copied, saved, compiled, checkpointed.

Shapes: B batch, P prompt, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftlib
from peftlib import Adapter, LoRA, PrefixTuning, PromptTuning, PTuningV1, PTuningV2, attach, use
from tests.methods.prompts import Decoder, V, naive, prepended, rows_of, visible
from tests.twin import assert_twins, assert_untouched, classes, randomize, snapshot

B, T, P = 3, 5, 3
IDX = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(7))
CAUSAL = torch.ones(T, T, dtype=torch.bool).tril()
METHODS = {
    "prompt": PromptTuning(length=P),
    "lstm": PTuningV1(length=P, hidden=4),
    "mlp": PTuningV1(length=P, encoder="mlp"),
}


def by_hand(model: Decoder, rows_PD: Tensor) -> Tensor:
    """The logits with rows in front, through the twin."""
    P = len(rows_PD)
    seen, where = visible(CAUSAL.expand(B, T, T), P, False), torch.arange(P + T).expand(B, P + T)
    return naive(model, prepended(model, rows_PD, IDX), seen, where)[:, P:]


# -- several prompts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(2, 3), (3, 3), (1, 4)])
def test_two_prompts_stand_in_the_order_in_which_they_came(lengths):
    model = Decoder()
    one, two = (
        attach(model, PromptTuning(length=n), example=IDX, name=f"p{i}") for i, n in enumerate(lengths)
    )
    a, b = rows_of(one), rows_of(two)
    leaves = {"a": a, "b": b}
    # The first one is the innermost: it puts its rows before what it is given.
    assert_twins(lambda: model(IDX), lambda: by_hand(model, torch.cat([a, b])), leaves)
    with one.disabled():
        assert_twins(lambda: model(IDX), lambda: by_hand(model, b), {"b": b})
    with two.disabled():
        assert_twins(lambda: model(IDX), lambda: by_hand(model, a), {"a": a})
    assert_twins(lambda: model(IDX), lambda: by_hand(model, torch.cat([a, b])), leaves)


def test_two_prompts_with_every_argument():
    model = Decoder()
    for name in "ab":
        rows_of(attach(model, PromptTuning(length=2), example=IDX, name=name))
    both = Decoder()
    both.load_state_dict({k: v for k, v in model.state_dict().items() if "_peft" not in k})
    rows = torch.cat([next(iter(t.parameters())).detach() for t in peftlib.tunings(model).values()])
    tuning = attach(both, PromptTuning(length=4), example=IDX)
    with torch.no_grad():
        next(iter(tuning.parameters())).copy_(rows)
    keep = torch.arange(T) < torch.tensor([5, 3, 2])[:, None]
    calls: list[dict[str, Any]] = [
        {"attn_mask": CAUSAL},
        {"attention_mask": keep.long(), "position_ids": torch.arange(T)},
        {"token_type_ids": torch.ones(B, T, dtype=torch.long), "targets": IDX},
    ]
    for call in calls:
        found, expected = model(IDX, **call), both(IDX, **call)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_use_switches_between_named_prompts():
    model = Decoder()
    base = copy.deepcopy(model)(IDX)
    outs = {}
    for name, length in (("short", 1), ("long", 6), ("middle", 3)):
        rows_of(attach(model, PromptTuning(length=length), example=IDX, name=name))
        with use(model, name):
            outs[name] = model(IDX)
    for name, expected in outs.items():
        use(model, name)
        assert torch.equal(model(IDX), expected)
    use(model)
    assert torch.equal(model(IDX), base)
    for tuning in peftlib.tunings(model).values():
        tuning.detach()
    assert torch.equal(model(IDX), base)


class EncoderInside(nn.Module):
    """Ids, an inner module that takes them, and one that takes its vectors."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tok, self.rnn = nn.Embedding(V, 8), nn.GRU(8, 8, batch_first=True)

        def forward(self, ids: Tensor) -> Tensor:
            return self.rnn(self.tok(ids))[0]

    def __init__(self) -> None:
        super().__init__()
        self.body, self.top = self.Body(), nn.GRU(8, 8, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        return self.top(self.body(ids))[0]


@pytest.mark.parametrize("order", list(itertools.permutations(["", "body", "top"])), ids=str)
def test_prompts_at_nested_modules(order):
    model = EncoderInside().double()
    rows = {}
    for target in order:
        name = target or "root"
        rows[name] = rows_of(attach(model, {target: PromptTuning(length=2)}, example=IDX, name=name))

    def twin() -> Tensor:
        e = model.body.tok.weight[IDX]
        long = [rows[k].expand(B, 2, 8) for k in ("body", "root", "top")]
        with use(model):
            h = model.body.rnn(torch.cat([long[0], long[1], e], 1))[0][:, 2:]
            return model.top(torch.cat([long[2], h], 1))[0][:, 4:]

    assert_twins(lambda: model(IDX), twin, rows)


# -- with other methods ------------------------------------------------------------------------------------------------


def test_every_kind_in_one_mapping():
    model = Decoder()
    mapping = {
        "": PromptTuning(length=P),
        "blocks.*.qkv": LoRA(rank=2),
        "blocks.*.mlp": Adapter(dim=2),
        "blocks.1": PrefixTuning(length=2, hidden=4),
    }
    tuning = attach(model, mapping, example=IDX)
    leaves = randomize(tuning, 0.3)
    rows = next(p for n, p in leaves.items() if n.endswith("prompt.rows"))
    prompt = next(part for part in tuning.parts if part.built and part.name == "")

    def twin() -> Tensor:
        # The same model with the prompt's embeddings written out; the other methods act as ever.
        embeds = torch.cat([rows.expand(B, P, 8), model.tok.weight[IDX]], 1)
        bare = prompt.host._peft_active
        prompt.host.__dict__["_peft_active"] = ()
        try:
            return model(inputs_embeds=embeds)[:, P:]
        finally:
            prompt.host.__dict__["_peft_active"] = bare

    assert_twins(lambda: model(IDX), twin, leaves)


@pytest.mark.parametrize("order", ["prompt first", "prompt last"])
@pytest.mark.parametrize("other", [LoRA(rank=2), Adapter(dim=2)], ids=str)
def test_another_method_at_the_embedding_leaves_the_rows(order, other):
    model = Decoder()
    embedded: list[Tensor] = []
    made: dict[str, Any] = {}
    jobs = [("prompt", {"": PromptTuning(length=P)}), ("other", {"tok": other})]
    for name, mapping in jobs if order == "prompt first" else jobs[::-1]:
        made[name] = attach(model, mapping, name=name, example=IDX)
        randomize(made[name])
    (rows,) = made["prompt"].parameters()
    with made["prompt"].disabled():
        real = model.tok(IDX)
        assert not torch.equal(real, model.tok.weight[IDX])
    model.tok.register_forward_hook(lambda module, args, out: embedded.append(out))
    model(IDX)
    assert torch.equal(embedded[0][:, :P], rows.expand(B, P, 8))
    torch.testing.assert_close(embedded[0][:, P:], real)


@pytest.mark.parametrize("method", METHODS)
def test_a_task_head_beside_the_prompt(method):
    model = Decoder()
    tuning = attach(model, {"": METHODS[method], "head": peftlib.FullFineTuning()}, example=IDX)
    model(IDX).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tuning.parameters())
    assert model.tok.weight.grad is None


# -- copies and files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_copies_live_lives_of_their_own(method):
    model = Decoder()
    randomize(attach(model, METHODS[method], example=IDX), 0.5)
    expected = model(IDX)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(IDX), expected)
        tuning = peftlib.tunings(twin)["default"]
        with torch.no_grad():
            for p in tuning.parameters():
                p.zero_()
        assert not torch.equal(twin(IDX), expected)
        assert torch.equal(model(IDX), expected)
        tuning.detach()
        assert not peftlib.tunings(twin)
        assert torch.equal(model(IDX), expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_file_needs_no_example(method, tmp_path):
    model = Decoder()
    fresh = copy.deepcopy(model)
    before, kinds = snapshot(fresh), classes(fresh)
    randomize(attach(model, METHODS[method], example=IDX), 0.5)
    peftlib.tunings(model)["default"].save(tmp_path / "prompt.safetensors")
    tuning = peftlib.load(fresh, tmp_path / "prompt.safetensors")
    keep = torch.arange(T) < torch.tensor([5, 3, 2])[:, None]
    assert torch.equal(fresh(IDX, attention_mask=keep), model(IDX, attention_mask=keep))
    for a, b in zip(fresh(IDX, targets=IDX), model(IDX, targets=IDX), strict=True):
        assert torch.equal(a, b)
    tuning.detach()
    assert_untouched(fresh, before, kinds)


def test_a_file_knows_what_was_named(tmp_path):
    class Weighted(Decoder):
        def forward(self, ids: Tensor, importance: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(ids) * importance[..., None]

    model, weights = Weighted(), torch.rand(B, T, dtype=torch.float64)
    fresh = copy.deepcopy(model)
    method = PromptTuning(length=P, sequence_args={"importance": "mask"}, init=[1, 2, 3])
    attach(model, method, example=(IDX, weights)).save(tmp_path / "prompt.safetensors")
    peftlib.load(fresh, tmp_path / "prompt.safetensors")
    assert torch.equal(fresh(IDX, weights), model(IDX, weights))


@pytest.mark.parametrize("method", METHODS)
def test_disabled_is_the_base_bit_for_bit(method):
    model = Decoder()
    base = model(IDX)
    before, kinds = snapshot(model), classes(model)
    tuning = attach(model, METHODS[method], example=IDX)
    randomize(tuning)
    with tuning.disabled():
        assert torch.equal(model(IDX), base)
    assert not torch.equal(model(IDX), base)
    tuning.detach()
    assert torch.equal(model(IDX), base)
    assert_untouched(model, before, kinds)


# -- compiled ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("method", METHODS)
def test_one_graph_for_every_length(method, fresh_compiler):
    model = Decoder()
    del model.blocks[1]
    tuning = attach(model, METHODS[method], example=IDX)
    leaves = randomize(tuning, 0.5)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert_twins(lambda: compiled(IDX), lambda: model(IDX), leaves)
    assert graphs() == 1
    texts = [torch.randint(0, V, (b, t)) for b, t in ((3, 7), (2, 7), (4, 9), (5, 11), (6, 4), (7, 2))]
    for ids in texts:
        torch.testing.assert_close(compiled(ids), model(ids))
    # One more with a length that varies, one with a batch that does.
    assert graphs() <= 3


def test_with_labels_and_masks_in_one_graph(fresh_compiler):
    model = Decoder()
    rows_of(attach(model, PromptTuning(length=P), example=IDX))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    keep = (torch.arange(T) < torch.tensor([5, 3, 2])[:, None]).long()
    calls: list[dict[str, Any]] = [
        {"targets": IDX},
        {"attention_mask": keep, "position_ids": torch.arange(T)},
        {"attn_mask": CAUSAL},
    ]
    for call in calls:
        for a, b in zip(compiled(IDX, **call), model(IDX, **call), strict=True):
            torch.testing.assert_close(a, b)


def test_a_switch_is_seen_by_the_compiled_model(fresh_compiler):
    model = Decoder()
    base = model(IDX)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(IDX), base)
    one = attach(model, PromptTuning(length=P), example=IDX, name="one")
    two = attach(model, PromptTuning(length=2), example=IDX, name="two")
    rows_of(one), rows_of(two)
    for names in (("one",), ("two",), ("one", "two"), (), ("one",)):
        use(model, *names)
        torch.testing.assert_close(compiled(IDX), model(IDX))
    use(model)
    torch.testing.assert_close(compiled(IDX), base)


def test_a_cache_in_a_compiled_model(fresh_compiler):
    model = Decoder()
    rows_of(attach(model, PromptTuning(length=P), example=IDX))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        logits, past = compiled(IDX, past=[])
        torch.testing.assert_close(logits, model(IDX))
        more = logits[:, -1:].argmax(-1)
        step, _ = compiled(more, past=past)
        torch.testing.assert_close(step, model(torch.cat([IDX, more], 1))[:, -1:])


# -- checkpoints -------------------------------------------------------------------------------------------------------


class Checkpointed(Decoder):
    """Recomputes its blocks, or from the embedding on, in the backward."""

    reentrant: bool | None = None
    whole = False

    def forward(self, ids: Tensor) -> Tensor:  # type: ignore[override]
        def run(ids: Tensor) -> Tensor:
            return super(Checkpointed, self).forward(ids)

        if self.whole:
            return checkpoint(run, ids, use_reentrant=False)
        x = self.tok(ids) + self.pos.weight[: ids.shape[1]]
        bias = torch.full((ids.shape[1],) * 2, -torch.inf, dtype=x.dtype).triu(1)
        for block in self.blocks:
            x = (
                block(x, bias, None)[0]
                if self.reentrant is None
                else checkpoint(block, x, bias, None, use_reentrant=self.reentrant)[0]
            )
        return self.head(x)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_blocks_give_the_same_gradients(method, reentrant):
    model = Checkpointed()
    tuning = attach(model, METHODS[method], example=IDX)
    randomize(tuning, 0.5)

    def grads() -> list[Tensor]:
        for p in tuning.parameters():
            p.grad = None
        model(IDX).square().mean().backward()
        return [p.grad.clone() for p in tuning.parameters()]  # type: ignore[union-attr]

    expected = grads()
    model.reentrant = reentrant
    for found, kept in zip(grads(), expected, strict=True):
        assert torch.equal(found, kept)


def test_a_recomputed_embedding_is_refused():
    model = Checkpointed()
    rows_of(attach(model, PromptTuning(length=P), example=IDX))
    model.whole = True
    loss = model(IDX).square().mean()
    with pytest.raises(peftlib.PeftlibError, match="recomputed in a checkpoint"):
        loss.backward()


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_training_lowers_the_loss_and_spares_the_base(method):
    model = Decoder()
    before = snapshot(model)
    tuning = attach(model, METHODS[method], example=IDX)
    optimizer = torch.optim.Adam(tuning.parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        _, loss = model(IDX, targets=torch.zeros_like(IDX))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    tuning.detach()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_prompt_beside_deep_prompts():
    model = Decoder()
    deep = attach(model, PTuningV2(length=2), example=IDX, name="deep")
    prompt = attach(model, PromptTuning(length=P), example=IDX, name="prompt")
    leaves = randomize(deep) | randomize(prompt)
    (rows,) = prompt.parameters()

    def twin() -> Tensor:
        with prompt.disabled():
            embeds = torch.cat([rows.expand(B, P, 8), model.tok.weight[IDX]], 1)
            return model(inputs_embeds=embeds)[:, P:]

    assert_twins(lambda: model(IDX), twin, leaves)
