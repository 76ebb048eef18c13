"""The MLP that all sites of a prefix tuning share: run once for each forward, with each site's own run as the twin."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import peftlib
from peftlib import PrefixTuning, PTuningV1
from peftlib.methods import shared_prefix
from peftlib.methods.shared_prefix import SharedPrefix
from tests.methods.test_prefix import IDS, D, Decoder
from tests.twin import randomize

Model = Any


class Blocks(Decoder):
    """A decoder that can recompute its blocks in the backward, as training scripts do."""

    reentrant: bool | None = None

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        if self.reentrant:
            x = x.detach().requires_grad_()
        for layer in self.layers:
            block = lambda x, layer=layer: x + layer(F.layer_norm(x, x.shape[-1:]), causal=True)  # noqa: E731
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


def make() -> tuple[Model, peftlib.Tuning, list[int]]:
    """A decoder with a prefix, its tuning, and one entry for each time that the MLP ran."""
    model = Blocks().to(D)
    tuning = peftlib.attach(model, PrefixTuning(length=3, hidden=4), example=IDS)
    randomize(tuning)
    return model, tuning, counted(tuning)


def counted(tuning: peftlib.Tuning) -> list[int]:
    calls: list[int] = []
    shared: Any = next(p.delta for p in tuning.parts if not p.built)
    shared.mlp.down.register_forward_hook(lambda *a: calls.append(1))
    return calls


def gradients_of(model: Model, tuning: peftlib.Tuning, step: Callable[[Model], Any]) -> dict[str, Tensor]:
    step(model)
    found = {n: p.grad for n, p in tuning.named_parameters() if p.grad is not None}
    assert len(found) == len(dict(tuning.named_parameters()))
    model.zero_grad()
    return found


def loss(model: Model, ids: Tensor = IDS) -> Tensor:
    return model(ids).square().mean()


def one(model: Model) -> None:
    loss(model).backward()


def accumulated(model: Model) -> None:
    one(model)
    loss(model, IDS.flip(1)).backward()


def two_at_once(model: Model) -> None:
    first, second = loss(model), loss(model, IDS.flip(1))
    second.backward()
    first.backward()


def two_in_one(model: Model) -> None:
    (loss(model) * loss(model, IDS.flip(1))).backward()


def twice_through_one_graph(model: Model) -> None:
    value = loss(model)
    value.backward(retain_graph=True)
    value.backward()


def of_gradients(model: Model) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    with sdpa_kernel(SDPBackend.MATH):
        value = loss(model)
    grads = torch.autograd.grad(value, trained, create_graph=True)
    torch.stack([g.square().sum() for g in grads]).sum().backward()


def in_a_checkpoint(model: Model) -> None:
    checkpoint(loss, model, use_reentrant=False).backward()


def after_a_failure(model: Model) -> None:
    handle = model.layers[1].register_forward_pre_hook(lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(IDS)
    handle.remove()
    one(model)


def after_an_evaluation(model: Model) -> None:
    with torch.no_grad():
        model(IDS)
    one(model)


@pytest.mark.parametrize(
    "step, runs",
    [
        (one, 1),
        (accumulated, 2),
        (two_at_once, 2),
        (two_in_one, 2),
        (twice_through_one_graph, 1),
        (of_gradients, 1),
        (in_a_checkpoint, 2),  # the forward, and the one in the backward
        (after_a_failure, 2),
        (after_an_evaluation, 2),
    ],
)
def test_one_run_for_each_forward(step: Any, runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tuning, calls = make()
    ours = gradients_of(model, tuning, step)
    assert len(calls) == runs
    monkeypatch.setattr(SharedPrefix, "hidden", SharedPrefix._compute)
    torch.testing.assert_close(ours, gradients_of(model, tuning, step), rtol=1e-10, atol=1e-12)
    assert len(calls) > 2 * runs, "the twin runs it once for each site"
    assert not shared_prefix._RUNNING.get()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("step", [one, accumulated, two_at_once, two_in_one, in_a_checkpoint])
def test_checkpointed_blocks(step: Any, reentrant: bool) -> None:
    if reentrant and step is in_a_checkpoint:
        pytest.skip("torch does not nest them")
    model, tuning, calls = make()
    plain = gradients_of(model, tuning, step)
    forwards = len(calls)
    calls.clear()
    model.reentrant = reentrant
    torch.testing.assert_close(gradients_of(model, tuning, step), plain, rtol=1e-10, atol=1e-12)
    # Each recomputed block runs it for itself; a reentrant one also ran without gradients before, from one cache.
    assert len(calls) <= forwards * (1 + 3 + reentrant)
    assert not shared_prefix._RUNNING.get()


def test_gradients_taken_inside_a_forward() -> None:
    """A model that differentiates inside its forward, through checkpointed blocks, uses no graph twice."""

    class Energy(Blocks):
        def forward(self, ids: Tensor) -> Tensor:
            if not self.training:
                return super().forward(ids)
            x = super().forward(ids)
            x.square().mean().backward()
            return x

    model = Energy().to(D)
    tuning = peftlib.attach(model.eval(), PrefixTuning(length=3, hidden=4), example=IDS)
    randomize(tuning)
    plain = gradients_of(model, tuning, one)
    for reentrant in (None, False, True):
        model.train().reentrant = reentrant
        torch.testing.assert_close(gradients_of(model, tuning, lambda m: m(IDS)), plain)
        model.eval()


def test_without_gradients_the_result_is_kept_for_all_sites() -> None:
    model, tuning, calls = make()
    with torch.no_grad():
        first = model(IDS)
        assert torch.equal(model(IDS), first)
        assert len(calls) == 1
        dict(tuning.named_parameters())["prefixtuning.mlp.table"].add_(1.0)
        assert not torch.equal(model(IDS), first)
        assert len(calls) == 2


def test_a_part_called_by_itself_and_a_frozen_tuning() -> None:
    model, tuning, calls = make()
    x = torch.randn(2, 4, 8, dtype=D)
    model.layers[0](x, causal=True).sum().backward()
    assert len(calls) == 1
    assert dict(tuning.named_parameters())["prefixtuning.mlp.table"].grad is not None
    for p in tuning.parameters():
        p.requires_grad_(False)
    calls.clear()
    model(IDS)
    assert len(calls) == 1


def test_copies_switches_and_the_end() -> None:
    model, tuning, calls = make()
    plain = Blocks().to(D)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "_peft" not in k})
    ours = model(IDS)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(IDS), ours)
    with torch.no_grad():
        for p in tuning.parameters():
            p.zero_()
    assert torch.equal(twin(IDS), ours)
    calls.clear()
    with tuning.disabled():
        assert torch.equal(model(IDS), plain(IDS))
    assert not calls
    randomize(tuning)
    before = model(IDS)
    calls.clear()
    tuning.fold()
    torch.testing.assert_close(model(IDS), before)
    assert len(calls) == 0 or calls == [1]  # while it folded
    tuning.detach()
    assert torch.equal(model(IDS), plain(IDS))
    assert not hasattr(model, "_peft")


def test_two_tunings_have_an_mlp_each() -> None:
    model, _, calls = make()
    alone = model(IDS)
    other = peftlib.attach(model, PrefixTuning(length=2, hidden=3), example=IDS, name="other")
    randomize(other)
    others = counted(other)
    calls.clear()
    assert not torch.allclose(model(IDS), alone)
    assert len(calls) == len(others) == 1
    with other.disabled():
        torch.testing.assert_close(model(IDS), alone)


def test_autocast_inside_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block under autocast gets what it would have computed there."""

    class Cast(Blocks):
        def forward(self, ids: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(ids)

    model = Cast()
    tuning = peftlib.attach(model, PrefixTuning(length=3, hidden=4), example=IDS)
    randomize(tuning)
    ours = gradients_of(model, tuning, one)
    monkeypatch.setattr(SharedPrefix, "hidden", SharedPrefix._compute)
    torch.testing.assert_close(ours, gradients_of(model, tuning, one), rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled(backend: str) -> None:
    model, tuning, _ = make()
    plain = gradients_of(model, tuning, one)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(gradients_of(model, tuning, lambda _: loss(compiled).backward()), plain)


def test_the_encoder_of_p_tuning_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for placeholder in (None, 12):
        model = Blocks().to(D)
        method = PTuningV1(length=2, encoder="mlp", placeholder_id=placeholder)
        tuning = peftlib.attach(model, method, example=IDS)
        calls: list[int] = []
        prompt: Any = next(p.delta.prompt for p in tuning.parts if "prompt" in p.delta._modules)
        prompt.mlp.register_forward_hook(lambda *a, calls=calls: calls.append(1))
        ids = torch.tensor([[12, 4, 12, 7], [3, 12, 12, 0]])
        model(ids).sum().backward()
        assert calls == [1]
        assert all(p.grad is not None for p in tuning.parameters())
