"""The contract: what holds for every method on every host, whatever the method.

Each invariant is a function of one :class:`~tests.zoo.Pair`, without any branch on which method it is. What methods
differ in they declare (:class:`~tests.zoo.Case`), or it shows: a merge that raises must leave the model alone.
"""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftlib
from peftlib import PeftlibError
from tests.zoo import CASES, SAMPLE, Pair, nudge, seeded

INVARIANTS: list[Callable[[Pair], None]] = []
"""What every pair is checked on."""

COMPILED: list[Callable[[Pair], None]] = []
"""What takes a compilation, which costs as much as all the rest: a sample every time, every pair with ``-m slow``."""


def invariant(check: Callable[[Pair], None]) -> Callable[[Pair], None]:
    INVARIANTS.append(check)
    return check


def compilation(check: Callable[[Pair], None]) -> Callable[[Pair], None]:
    COMPILED.append(check)
    return check


# -- comparing ---------------------------------------------------------------------------------------------------------

EPSILON = {torch.float64: 1e-9, torch.float32: 3e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two outputs agree to the accuracy of their dtype."""
    return a.keys() == b.keys() and all(
        x.shape == b[k].shape
        and x.dtype == b[k].dtype
        and torch.allclose(
            x, b[k], rtol=EPSILON.get(x.dtype, 0), atol=EPSILON.get(x.dtype, 0), equal_nan=True
        )
        for k, x in a.items()
    )


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two outputs agree bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(x, b[k]) for k, x in a.items())


def agree(pair: Pair, a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit where an open site computes what the closed one does."""
    return same(a, b) if pair.host.exact else close(a, b)


def loss_of(outputs: dict[str, Tensor]) -> Tensor:
    """Distance to a fixed random target, so that no normalization makes it constant."""
    with seeded(5):
        wide = [t.double() for t in outputs.values() if t.is_floating_point()]
        return sum(((t - torch.randn_like(t)) ** 2).mean() for t in wide)  # type: ignore[return-value]


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All there is to know about a model: classes, ``__dict__``s, children, hooks, flags, and every bit."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found[f"{name}: class"] = type(module)
        found[f"{name}: id"] = id(module)
        found[f"{name}: names"] = list(module.__dict__)
        for key, value in module.__dict__.items():
            found[f"{name}.{key}"] = frozen(value)
    return found


def frozen(value: Any) -> Any:
    """A value that can be compared later: tensors by identity, place, flags and bits, containers by content."""
    if isinstance(value, Tensor):
        bits = None
        if not value.is_meta:
            bits = value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        place = None if value.is_meta else value.data_ptr()
        grad = value.grad is not None if value.is_leaf else None
        about = (id(value), type(value), value.dtype, value.shape, value.stride(), value.requires_grad, grad)
        return *about, place, bits
    if isinstance(value, dict):
        return [(key, frozen(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return [frozen(item) for item in value]
    if isinstance(value, (bool, int, float, str, bytes, type(None), type, torch.dtype, torch.device)):
        return value
    return (type(value), id(value))


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [k for k in {**before, **after} if before.get(k, "absent") != after.get(k, "absent")]


# -- the model stays the user's ----------------------------------------------------------------------------------------


@invariant
def base_keys_survive(pair: Pair) -> None:
    model = pair.host.model()
    values = {k: v.clone() for k, v in model.state_dict().items()}
    parameters = {k: id(p) for k, p in model.named_parameters()}
    modules = [(n, id(m), type(m)) for n, m in model.named_modules()]
    pair.attach(model)
    state = model.state_dict()
    assert [k for k in state if k in values] == list(values)
    assert same({k: state[k] for k in values}, values)
    assert {k: id(p) for k, p in model.named_parameters() if k in parameters} == parameters
    now = dict(model.named_modules())
    for name, identity, cls in modules:
        assert id(now[name]) == identity
        assert isinstance(now[name], cls)
        assert type(now[name]).__name__ == cls.__name__


@invariant
def detach_is_exact(pair: Pair) -> None:
    model = pair.host.model()
    before = snapshot(model)
    tuning = pair.attach(model)
    train(pair, model, tuning)
    tuning.detach()
    assert not differences(before, snapshot(model))
    assert not peftlib.tunings(model)
    with pytest.raises(PeftlibError, match="detached"):
        tuning.enable()


@invariant
def attaching_changes_no_output_where_declared(pair: Pair) -> None:
    model, _ = pair.attached()
    model.eval()
    before = pair.run(pair.host.base().eval())
    if pair.case.identity:
        assert close(pair.run(model), before)
    else:
        assert not agree(pair, pair.run(model), before)


@invariant
def disabled_equals_base(pair: Pair) -> None:
    model, tuning = pair.tuned()
    before = pair.run(pair.host.base())
    tuned = pair.run(model)
    assert not agree(pair, tuned, before), "the tuning has no effect at all"
    with tuning.disabled():
        assert agree(pair, pair.run(model), before)
    assert same(pair.run(model), tuned)
    tuning.disable()
    assert agree(pair, pair.run(model), before)
    tuning.enable()
    assert same(pair.run(model), tuned)


# -- training ----------------------------------------------------------------------------------------------------------


@invariant
def only_the_tuning_gets_gradients(pair: Pair) -> None:
    plain = pair.host.model()
    loss_of(pair.run(plain)).backward()
    unused = {name for name, p in plain.named_parameters() if p.grad is None}

    model, tuning = pair.tuned()
    names = {id(p): n for n, p in model.named_parameters()}
    base = set(dict(plain.named_parameters()))
    loss_of(pair.run(model)).backward()
    trained = {id(p) for p in tuning.parameters()}
    for parameter in model.parameters():
        name = names[id(parameter)]
        if id(parameter) not in trained:
            assert parameter.grad is None, f"{name} is no part of the tuning"
            assert not parameter.requires_grad, name
        elif name in base:
            assert (parameter.grad is None) == (name in unused), name
        else:
            assert parameter.grad is not None, f"{name} gets no gradient"
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), f"{name} gets a gradient of zeros"


@invariant
def training_lowers_the_loss(pair: Pair) -> None:
    model, tuning = pair.attached()
    losses = train(pair, model, tuning, steps=6)
    assert losses[-1] < losses[0]


def train(pair: Pair, model: nn.Module, tuning: peftlib.Tuning, steps: int = 2) -> list[float]:
    # Squares of gradients vanish in float16, so what is divided by needs more than the usual 1e-8.
    optimizer = torch.optim.Adam(tuning.parameters(), lr=2e-2, eps=1e-3)
    losses = []
    for _ in range(steps):
        loss = loss_of(pair.run(model))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@invariant
def checkpointing_gives_the_same_gradients(pair: Pair) -> None:
    model, tuning = pair.tuned()
    model.train()
    loss_of(pair.run(model)).backward()
    plain = take_gradients(tuning)
    inputs = pair.host.example()
    # Random state is saved and put back by the checkpoint itself, so the same seed gives the same dropout.
    outputs = checkpoint(lambda: pair.host.run(model, inputs), use_reentrant=False)
    loss_of(outputs).backward()
    assert same(take_gradients(tuning), plain)


def take_gradients(tuning: peftlib.Tuning) -> dict[str, Tensor]:
    found = {n: p.grad for n, p in tuning.named_parameters() if p.grad is not None}
    for parameter in tuning.parameters():
        parameter.grad = None
    assert found
    return found


@invariant
def eval_equals_training_without_dropout(pair: Pair) -> None:
    model, tuning = pair.tuned()
    evaluated = pair.run(model.eval())
    trained = pair.run(model.train())
    if pair.host.same_in_training:
        assert close(trained, evaluated) != pair.case.dropout
        assert same(pair.run(model.eval()), evaluated)
    assert all(part.delta.training is model.training for part in tuning.parts)


@invariant
def every_site_is_executed(pair: Pair) -> None:
    model, tuning = pair.attached()
    assert tuning.sites
    pair.run(model)
    assert not tuning.idle_sites()


# -- files, copies -----------------------------------------------------------------------------------------------------


@invariant
def a_saved_tuning_gives_the_same_outputs_on_a_fresh_model(pair: Pair) -> None:
    model, tuning = pair.tuned()
    train(pair, model, tuning, steps=1)
    fresh = pair.host.model()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tuning.safetensors"
        tuning.save(path)
        with safetensors.safe_open(path, framework="pt") as file:
            assert set(file.keys()) == set(tuning.state_dict())
        loaded = peftlib.load(fresh, path)
    assert loaded.name == tuning.name
    assert loaded.sites.keys() == tuning.sites.keys()
    assert loaded.num_parameters == tuning.num_parameters
    assert same(loaded.state_dict(), tuning.state_dict())
    assert same(pair.run(fresh.eval()), pair.run(model.eval()))
    # It can be trained on, and leaves the model as exactly as one that was attached.
    before = snapshot(pair.host.model())
    loss_of(pair.run(fresh)).backward()
    assert take_gradients(loaded).keys() <= dict(loaded.named_parameters()).keys()
    loaded.detach()
    assert same(dict(fresh.state_dict()), dict(pair.host.model().state_dict()))
    assert before.keys() == snapshot(fresh).keys()


@invariant
def training_goes_on_as_if_it_had_never_stopped(pair: Pair) -> None:
    model, tuning = pair.attached()
    optimizer = torch.optim.Adam(tuning.parameters(), lr=2e-2, eps=1e-3)
    some_steps(pair, model, optimizer, 2)
    fresh = pair.host.model()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tuning.safetensors"
        tuning.save(path, optimizer=optimizer)
        loaded = peftlib.load(fresh, path)
        # In another order than before, too.
        again = torch.optim.Adam(list(loaded.parameters())[::-1])
        loaded.load_optimizer(again, path)
    stopped = {k: v.clone() for k, v in tuning.state_dict().items()}
    some_steps(pair, model, optimizer, 2, seed=9)
    some_steps(pair, fresh, again, 2, seed=9)
    assert same(loaded.state_dict(), tuning.state_dict())
    assert not same(stopped, tuning.state_dict())
    assert same(pair.run(fresh.eval()), pair.run(model.eval()))


def some_steps(
    pair: Pair, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 8
) -> None:
    with seeded(seed):
        for _ in range(steps):
            optimizer.zero_grad()
            loss_of(pair.run(model)).backward()
            optimizer.step()


@invariant
def the_state_has_only_its_own_keys(pair: Pair) -> None:
    model, tuning = pair.tuned()
    state = tuning.state_dict()
    for key in state:
        assert any(key.startswith(part.prefix + ".") for part in tuning.parts), key
    trained = {id(p) for p in tuning.parameters()}
    frozen_base = {p.data_ptr() for n, p in pair_base(pair, model) if id(p) not in trained and p.numel()}
    assert not [k for k, v in state.items() if v.data_ptr() in frozen_base]
    assert dict(tuning.named_parameters()).keys() <= state.keys()
    assert tuning.num_parameters == sum(p.numel() for p in tuning.parameters())
    assert len(trained) == len(list(tuning.parameters())), "a parameter is listed twice"


def pair_base(pair: Pair, model: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    base = set(dict(pair.host.model().named_parameters()))
    return [(n, p) for n, p in model.named_parameters() if n in base]


@invariant
def loading_names_every_wrong_key_and_writes_nothing(pair: Pair) -> None:
    _, tuning = pair.tuned()
    before = {k: v.clone() for k, v in tuning.state_dict().items()}
    other = {k: v + 1 for k, v in before.items()}
    first = next(iter(other))
    reshaped = other | {first: torch.zeros(*other[first].shape, 2)}
    for state in ({k: v for k, v in other.items() if k != first}, reshaped):
        with pytest.raises(PeftlibError) as error:
            tuning.load_state_dict(state)
        assert first in str(error.value)
    with pytest.raises(PeftlibError, match=r"no\.such\.key"):
        tuning.load_state_dict(other | {"no.such.key": torch.zeros(2)})
    assert same(tuning.state_dict(), before)
    tuning.load_state_dict(other)
    assert same(tuning.state_dict(), other)


@invariant
def a_deep_copy_is_independent(pair: Pair) -> None:
    model, tuning = pair.tuned()
    before, tuned = pair.run(pair.host.model()), pair.run(model)
    twin = copy.deepcopy(model)
    assert same(pair.run(twin), tuned)
    other = peftlib.tunings(twin)[tuning.name]
    inside = {id(p) for p in twin.parameters()}
    assert all(id(p) in inside for p in other.parameters())
    assert not inside & {id(p) for p in model.parameters()}
    nudge(other, seed=6)
    assert same(pair.run(model), tuned)
    assert not agree(pair, pair.run(twin), tuned)
    other.detach()
    assert same(pair.run(twin), before)
    assert same(pair.run(model), tuned)
    tuning.detach()
    assert same(pair.run(model), before)


@invariant
def a_pickle_gives_the_same_outputs(pair: Pair) -> None:
    if not pair.host.pickles:
        pytest.skip("the plain model cannot be pickled")
    model, tuning = pair.tuned()
    tuned = pair.run(model)
    twin = pickle.loads(pickle.dumps(model))
    assert same(pair.run(twin), tuned)
    other = peftlib.tunings(twin)[tuning.name]
    nudge(other, seed=6)
    assert not agree(pair, pair.run(twin), tuned)
    other.detach()
    assert same(pair.run(twin), pair.run(pair.host.model()))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert same(pair.run(torch.load(file, weights_only=False)), tuned)


# -- dtype, device -----------------------------------------------------------------------------------------------------


@invariant
def dtype_follows_the_host(pair: Pair) -> None:
    model, tuning = pair.tuned()
    floats = {t.dtype for t in tuning.state_dict().values() if t.is_floating_point()}
    assert floats == {pair.host.dtype}
    for key, value in pair.run(model).items():
        assert value.dtype == pair.run(pair.host.model())[key].dtype, key
    model.to(torch.float64)
    assert {t.dtype for t in tuning.state_dict().values() if t.is_floating_point()} == {torch.float64}


@invariant
def a_model_on_meta_takes_it_as_well(pair: Pair) -> None:
    expected = {k: (v.shape, v.dtype) for k, v in pair.tuned()[1].state_dict().items()}
    model = pair.host.on_meta()
    before = snapshot(model)
    tuning = pair.attach(model)
    assert {k: (v.shape, v.dtype) for k, v in tuning.state_dict().items()} == expected
    assert all(v.is_meta for v in tuning.state_dict().values())
    tuning.detach()
    assert not differences(before, snapshot(model))


# -- several tunings ---------------------------------------------------------------------------------------------------


def partner_of(pair: Pair) -> Pair | None:
    """Another method for the same host: the first, in this order, of another kind."""
    for name in ("adapter", "lora", "lora-parameter", "bitfit"):
        case = CASES[name]
        if type(case.method) is not type(pair.case.method) and case.place in pair.host.places:
            return Pair(pair.host, case)
    return None


@invariant
def two_methods_compose_and_leave_in_either_order(pair: Pair) -> None:
    partner = partner_of(pair)
    assert partner is not None
    model = pair.host.model()
    before, plain = snapshot(model), pair.run(pair.host.base())
    for tuning in (first := pair.attach(model, "first"), second := partner.attach(model, "second")):
        nudge(tuning)
    both = pair.run(model)
    with peftlib.use(model, "first"):
        first_alone = pair.run(model)
    with peftlib.use(model, "second"):
        second_alone = pair.run(model)
    with peftlib.use(model):
        assert agree(pair, pair.run(model), plain)
    assert same(pair.run(model), both)
    assert not agree(pair, both, first_alone)
    assert not agree(pair, both, second_alone)

    twin = copy.deepcopy(model)
    first.detach()
    assert agree(pair, pair.run(model), second_alone)
    second.detach()
    assert not differences(before, snapshot(model))
    peftlib.tunings(twin)["second"].detach()
    assert agree(pair, pair.run(twin), first_alone)
    peftlib.tunings(twin)["first"].detach()
    assert snapshot(twin).keys() == before.keys()
    assert same(pair.run(twin.requires_grad_(False)), plain)


@invariant
def a_second_name_adds_nothing_to_the_first(pair: Pair) -> None:
    model, tuning = pair.tuned()
    alone = pair.run(model)
    tuning.disable()
    second = pair.attach(model, "second")
    nudge(second, seed=7)
    peftlib.use(model, "default")
    assert same(pair.run(model), alone)
    peftlib.use(model, "second")
    assert not agree(pair, pair.run(model), alone)
    tuning.detach()
    second.detach()
    assert same(pair.run(model), pair.run(pair.host.model()))


# -- merging -----------------------------------------------------------------------------------------------------------


@invariant
def a_merge_equals_the_tuning_or_raises(pair: Pair) -> None:
    model, tuning = pair.tuned()
    tuned = pair.run(model.eval())
    before = snapshot(model)
    try:
        tuning.merge()
    except PeftlibError:
        assert not tuning.merged
        assert not differences(before, snapshot(model))
        assert same(pair.run(model), tuned)
        return
    assert close(pair.run(model), tuned)
    assert tuning.merge() is tuning
    assert close(pair.run(model), tuned)
    tuning.unmerge()
    assert not differences(before, snapshot(model))
    assert same(pair.run(model), tuned)
    # A detach out of the merged state is exact as well.
    tuning.merge()
    tuning.detach()
    fresh = pair.host.model().eval()
    assert same(dict(model.state_dict()), dict(fresh.state_dict()))
    assert same(pair.run(model), pair.run(fresh))


@invariant
def a_hundred_merges_leave_the_base_bit_identical(pair: Pair) -> None:
    cycles = 100 if pair.host.name in SAMPLE else 3
    model, tuning = Pair(replace(pair.host, dtype=torch.bfloat16), pair.case).tuned()
    before = snapshot(model)
    try:
        for _ in range(cycles):
            tuning.merge()
            tuning.unmerge()
    except PeftlibError:
        pass
    assert not differences(before, snapshot(model))


@invariant
def a_merged_state_dict_makes_a_plain_model_equal_or_is_refused(pair: Pair) -> None:
    model, tuning = pair.tuned()
    tuned = pair.run(model.eval())
    try:
        tuning.merge().unmerge()
        reason = None
    except PeftlibError as error:
        reason = str(error)
    before = snapshot(model)
    if reason is not None:
        with pytest.raises(PeftlibError) as refused:
            peftlib.merged_state_dict(model)
        assert str(refused.value) == reason
        assert not differences(before, snapshot(model))
        return
    state = peftlib.merged_state_dict(model)
    assert not differences(before, snapshot(model))
    fresh = pair.host.model().eval()
    about = lambda tensors: [(k, t.shape, t.dtype, t.requires_grad) for k, t in tensors.items()]  # noqa: E731
    assert about(state) == about(fresh.state_dict())
    fresh.load_state_dict(state)
    assert close(pair.run(fresh), tuned)


# -- compiling ---------------------------------------------------------------------------------------------------------


def compiled(model: nn.Module, backend: str) -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(model, backend=backend, fullgraph=True)  # type: ignore[return-value]


@compilation
def compiles_without_a_break(pair: Pair) -> None:
    model, _ = pair.tuned()
    eager = pair.run(model)
    fast = compiled(model, "eager")
    assert close(pair.run(fast), eager)


@compilation
def what_is_attached_after_compiling_is_seen(pair: Pair) -> None:
    model = pair.host.model()
    fast = compiled(model, "eager")
    before = pair.run(fast)
    tuning = pair.attach(model)
    nudge(tuning)
    assert close(pair.run(fast), pair.run(model))
    assert not close(pair.run(fast), before)
    with tuning.disabled():
        assert close(pair.run(fast), before)
    tuning.detach()
    assert close(pair.run(fast), before)


@compilation
def compiled_gradients_are_the_same(pair: Pair) -> None:
    model, tuning = pair.tuned()
    loss_of(pair.run(model)).backward()
    eager = take_gradients(tuning)
    loss_of(pair.run(compiled(model, "aot_eager"))).backward()
    assert close(take_gradients(tuning), eager)


@compilation
def inductor_gives_the_same(pair: Pair) -> None:
    model, tuning = pair.tuned()
    eager = pair.run(model)
    loss_of(eager).backward()
    gradients = take_gradients(tuning)
    outputs = pair.run(compiled(model, "inductor"))
    assert close(outputs, eager)
    loss_of(outputs).backward()
    assert close(take_gradients(tuning), gradients)
