"""Training that stops, is saved and goes on, against training that never stopped; bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftlib
from peftlib import FullFineTuning, LoRA, PeftlibError
from peftlib.container import read, write
from peftlib.errors import CheckpointError


class Lion(torch.optim.Optimizer):
    """Of one's own: a count as a plain number, a flag, and its average in float32 whatever the parameter is."""

    def __init__(self, parameters: Any, lr: float = 1e-2, betas: tuple[float, float] = (0.9, 0.99)):
        super().__init__(parameters, {"lr": lr, "betas": betas, "note": None})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            assert isinstance(group["betas"], tuple)
            one, two = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(
                        average=torch.zeros_like(p, dtype=torch.float32), count=0, fresh=True, size=(2, None)
                    )
                grad = p.grad.float()
                assert state["average"].dtype == torch.float32
                assert state["size"] == (2, None)
                update = (state["average"] * one + grad * (1 - one)).sign() / (1 + 0.1 * state["count"])
                state["average"].mul_(two).add_(grad, alpha=1 - two)
                state["count"], state["fresh"] = state["count"] + 1, False
                p.sub_(update.to(p.dtype), alpha=group["lr"])


Make = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "plain sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adamw tensor rate": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01)),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, lr_decay=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.01, t0=2),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "lion": Lion,
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))


def attached(model: nn.Module, **options: Any) -> peftlib.Tuning:
    torch.manual_seed(1)
    method = {"0": LoRA(rank=2), "2": LoRA(rank=3, use_dora=True), "4": FullFineTuning()}
    return peftlib.attach(model, method, name="chat", **options)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, which: range) -> None:
    dtype = next(model.parameters()).dtype
    for i in which:
        torch.manual_seed(100 + i)
        x, y = torch.randn(7, 5).to(dtype), torch.randn(7, 3).to(dtype)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()


def equal(a: Any, b: Any) -> bool:
    """Two states, in structure, kinds, dtypes and every bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("which", list(OPTIMIZERS))
def test_going_on_equals_never_having_stopped(which: str, dtype: torch.dtype, tmp_path: Path) -> None:
    make, path = OPTIMIZERS[which], tmp_path / "t.safetensors"
    straight = net().to(dtype)
    reference = attached(straight)
    start = {k: v.clone() for k, v in reference.state_dict().items()}
    through = make(reference.parameters())
    steps(straight, through, range(6))

    first = net().to(dtype)
    tuning = attached(first)
    optimizer = make(tuning.parameters())
    steps(first, optimizer, range(3))
    tuning.save(path, optimizer=optimizer)

    second = net().to(dtype)
    tuning = peftlib.load(second, path)
    optimizer = make(tuning.parameters())
    tuning.load_optimizer(optimizer, path)
    steps(second, optimizer, range(3, 6))

    assert equal(tuning.state_dict(), reference.state_dict())
    assert equal(optimizer.state_dict(), through.state_dict())
    assert not equal(start, reference.state_dict())


@pytest.mark.parametrize("which", [k for k in OPTIMIZERS if k != "plain sgd"])
def test_the_state_matters(which: str, tmp_path: Path) -> None:
    """Without it the same steps lead elsewhere, so the test above cannot pass by itself."""
    make, path = OPTIMIZERS[which], tmp_path / "t.safetensors"
    model = net()
    tuning = attached(model)
    optimizer = make(tuning.parameters())
    steps(model, optimizer, range(3))
    tuning.save(path, optimizer=optimizer)
    steps(model, optimizer, range(3, 6))
    other = net()
    again = peftlib.load(other, path)
    steps(other, make(again.parameters()), range(3, 6))
    assert not equal(again.state_dict(), tuning.state_dict())


def test_settings_come_back_and_a_schedule_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"

    def make(tuning: peftlib.Tuning, rate: float) -> torch.optim.Optimizer:
        named = list(tuning.named_parameters())
        return torch.optim.AdamW(
            [
                {"params": [n for n in named if "lora" in n[0]], "lr": rate},
                {"params": [n for n in named if "lora" not in n[0]], "weight_decay": 0.0, "maximize": False},
            ],
            lr=rate / 2,
            betas=(0.8, 0.9),
        )

    tuning = attached(net())
    optimizer = make(tuning, 0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    steps(tuning.model, optimizer, range(2))
    schedule.step()
    tuning.save(path, optimizer=optimizer)
    loaded = peftlib.load(net(), path)
    other = make(loaded, 9.0)
    loaded.load_optimizer(other, path)
    assert equal(other.state_dict(), optimizer.state_dict())
    assert [g["lr"] for g in other.param_groups] == [0.05, 0.025]
    assert other.param_groups[0]["betas"] == (0.8, 0.9)
    assert other.param_groups[0]["initial_lr"] == 0.1


def test_parameters_and_groups_are_known_by_name_not_by_place(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    model = net()
    tuning = attached(model)
    names = dict(tuning.named_parameters())

    def make(names: dict[str, nn.Parameter], turned: bool) -> torch.optim.Optimizer:
        groups: list[dict[str, Any]] = [
            {"params": [p for n, p in names.items() if n.startswith(k)], "lr": lr}
            for k, lr in (("0", 0.1), ("2", 0.2), ("4", 0.3))
        ]
        if turned:
            groups = [{**g, "params": g["params"][::-1]} for g in groups[::-1]]
        return torch.optim.Adam(groups)

    optimizer = make(names, False)
    steps(model, optimizer, range(3))
    tuning.save(path, optimizer=optimizer)
    fresh = net()
    loaded = peftlib.load(fresh, path)
    turned = make(dict(loaded.named_parameters()), True)
    loaded.load_optimizer(turned, path)
    assert [g["lr"] for g in turned.param_groups] == [0.3, 0.2, 0.1]
    steps(model, optimizer, range(3, 6))
    steps(fresh, turned, range(3, 6))
    assert equal(loaded.state_dict(), tuning.state_dict())


def test_a_part_of_the_tuning_may_be_trained(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    tuning = attached(net())
    some = [p for n, p in tuning.named_parameters() if n.startswith("0")]
    optimizer = torch.optim.Adam(some)
    steps(tuning.model, optimizer, range(1))
    tuning.save(path, optimizer=optimizer)
    loaded = peftlib.load(net(), path)
    again = torch.optim.Adam([p for n, p in loaded.named_parameters() if n.startswith("0")])
    loaded.load_optimizer(again, path)
    assert equal(again.state_dict(), optimizer.state_dict())


# -- the file ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, peftlib.Tuning, torch.optim.Optimizer]:
    tuning = attached(net())
    optimizer = torch.optim.Adam(tuning.parameters())
    steps(tuning.model, optimizer, range(2))
    tuning.save(tmp_path / "t.safetensors", optimizer=optimizer)
    return tmp_path / "t.safetensors", tuning, optimizer


def test_a_plain_load_passes_the_optimizer_over(saved: Any, tmp_path: Path) -> None:
    path, tuning, _ = saved
    loaded = peftlib.load(net(), path)
    assert equal(loaded.state_dict(), tuning.state_dict())
    loaded.save(tmp_path / "plain.safetensors")
    assert (tmp_path / "plain.safetensors").stat().st_size < path.stat().st_size / 2
    with pytest.raises(CheckpointError, match="was saved without an optimizer"):
        loaded.load_optimizer(torch.optim.Adam(loaded.parameters()), tmp_path / "plain.safetensors")


def test_damage_of_the_state_is_found_where_it_matters(saved: Any) -> None:
    path, tuning, _ = saved
    data = bytearray(path.read_bytes())
    # A stretch of bytes of one second moment, which nothing else in the file has.
    wanted = tuning_bytes(saved, "exp_avg_sq")
    at = data.index(wanted)
    data[at + 3] ^= 1
    path.write_bytes(data)
    loaded = peftlib.load(net(), path)
    assert equal(loaded.state_dict(), tuning.state_dict())
    optimizer = torch.optim.Adam(loaded.parameters(), lr=7.0)
    with pytest.raises(CheckpointError, match=r"checksum of 'optimizer/.*exp_avg_sq' does not fit"):
        loaded.load_optimizer(optimizer, path)
    assert optimizer.param_groups[0]["lr"] == 7.0
    assert not optimizer.state


def tuning_bytes(saved: Any, key: str) -> bytes:
    _, tuning, optimizer = saved
    values: Tensor = optimizer.state[next(tuning.parameters())][key]
    return values.numpy().tobytes()


Change = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    "change",
    [
        lambda o: o.clear(),
        lambda o: o.update({"class": 3}),
        lambda o: o.pop("groups"),
        lambda o: o.update(groups=3),
        lambda o: o.update(groups=[]),
        lambda o: o["groups"][0].update(parameters=[[]]),
        lambda o: o["groups"][0].update(settings=[1]),
        lambda o: o["groups"][0]["settings"].update(lr=3),
        lambda o: o["groups"][0]["settings"].update(lr={"tensor": "nowhere"}),
        lambda o: o.update(state=[1]),
        lambda o: o["state"].update(dict.fromkeys(o["state"], 3)),
        lambda o: o["state"].update({k: {"step": {}} for k in o["state"]}),
    ],
)
def test_forged_states_are_refused(change: Change, saved: Any) -> None:
    path, _, _ = saved
    about, tensors = read(path)
    change(about["optimizer"])
    write(path, tensors, about)
    loaded = peftlib.load(net(), path)
    optimizer = torch.optim.Adam(loaded.parameters(), lr=7.0)
    with pytest.raises(PeftlibError):
        loaded.load_optimizer(optimizer, path)
    assert optimizer.param_groups[0]["lr"] == 7.0
    assert not optimizer.state
    for value in (3, [], "x"):
        write(path, tensors, {**about, "optimizer": value})
        with pytest.raises(PeftlibError):
            loaded.load_optimizer(optimizer, path)


# -- what is refused ---------------------------------------------------------------------------------------------------


class Odd(torch.optim.SGD):
    """Keeps whatever a test puts there."""

    def __init__(self, parameters: Any, kept: Any):
        super().__init__(parameters, lr=0.1)
        self.kept = kept

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            self.state[p].update(self.kept)


@pytest.mark.parametrize(
    "kept, words",
    [
        ({"old": [torch.zeros(1)]}, "'old' of '0.lora.a' as a list of Tensor"),
        ({"made": {"a": 1}}, "'made' of '0.lora.a' as a dict"),
        ({0: torch.zeros(1)}, "0 of '0.lora.a' as a Tensor"),
        ({"kind": torch.nn.UninitializedBuffer()}, "'kind' of '0.lora.a' as a UninitializedBuffer"),
        ({"call": len}, "'call' of '0.lora.a' as a builtin_function_or_method"),
        ({"shape": (2,), "more": object()}, "'more' of '0.lora.a' as a object"),
    ],
)
def test_what_a_file_cannot_hold_is_named(kept: dict[Any, Any], words: str, tmp_path: Path) -> None:
    tuning = attached(net())
    optimizer = Odd(tuning.parameters(), kept)
    optimizer.step()
    with pytest.raises(CheckpointError) as caught:
        tuning.save(tmp_path / "t.safetensors", optimizer=optimizer)
    assert words in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_lbfgs_is_refused_by_name_once_it_has_a_history(tmp_path: Path) -> None:
    tuning = attached(net())
    optimizer = torch.optim.LBFGS(tuning.parameters())
    x = torch.randn(4, 5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = tuning.model(x).square().mean()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    with pytest.raises(CheckpointError, match=r"LBFGS keeps 'al' of '0.lora.a' as a list of Tensor"):
        tuning.save(tmp_path / "t.safetensors", optimizer=optimizer)


def test_more_than_states_and_groups_is_refused(tmp_path: Path) -> None:
    class More(torch.optim.SGD):
        def state_dict(self) -> dict[str, Any]:
            return {**super().state_dict(), "scaler": 1}

    class Global(torch.optim.SGD):
        def state_dict(self) -> dict[str, Any]:
            self.state["all"] = {"k": 1}  # type: ignore[index]
            return super().state_dict()

    tuning = attached(net())
    for kind, words in ((More, "has 'scaler' besides"), (Global, "a state under 'all'")):
        with pytest.raises(CheckpointError, match=words):
            tuning.save(tmp_path / "t.safetensors", optimizer=kind(tuning.parameters(), lr=0.1))


def test_parameters_that_are_not_the_tunings_are_refused_by_name(saved: Any, tmp_path: Path) -> None:
    path, tuning, _ = saved
    base = tuning.model[0].weight
    for more, words in ((base, r"trains '0\.weight'"), (nn.Parameter(torch.zeros(2, 9)), r"trains \(2, 9\)")):
        optimizer = torch.optim.Adam([*tuning.parameters(), more])
        with pytest.raises(CheckpointError, match=words):
            tuning.save(tmp_path / "new.safetensors", optimizer=optimizer)
        with pytest.raises(CheckpointError, match=words):
            tuning.load_optimizer(optimizer, path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_another_optimizer_tuning_or_grouping_is_refused(saved: Any, tmp_path: Path) -> None:
    path, tuning, _ = saved
    own = list(tuning.parameters())
    with pytest.raises(CheckpointError, match="holds the state of Adam; this is AdamW"):
        tuning.load_optimizer(torch.optim.AdamW(own), path)
    two = torch.optim.Adam([{"params": own[:2]}, {"params": own[2:]}])
    tuning.save(tmp_path / "two", optimizer=two)
    with pytest.raises(CheckpointError, match=r"has 2 group\(s\) .* they part at '2.lora.a'"):
        tuning.load_optimizer(torch.optim.Adam(own[:2]), tmp_path / "two")
    for groups in ([{"params": own[:2]}, {"params": own[2:]}], [{"params": own[1:]}]):
        optimizer = torch.optim.Adam(groups, lr=7.0)
        with pytest.raises(CheckpointError, match=r"has 1 group\(s\) .* they part at '"):
            tuning.load_optimizer(optimizer, path)
        assert optimizer.param_groups[0]["lr"] == 7.0
    other = peftlib.attach(net(), {"0": LoRA(rank=1)})
    with pytest.raises(CheckpointError, match=r"has it with shape \(2, 5\)"):
        other.load_optimizer(torch.optim.Adam(other.parameters()), path)
    other = peftlib.attach(net(), peftlib.BitFit())
    with pytest.raises(CheckpointError, match="does not have it"):
        other.load_optimizer(torch.optim.Adam(other.parameters()), path)
    for call in (
        lambda: tuning.save(path, optimizer=torch.optim.Adam),  # type: ignore[arg-type]
        lambda: tuning.load_optimizer("adam", path),  # type: ignore[arg-type]
    ):
        with pytest.raises(PeftlibError, match=r"takes a torch.optim.Optimizer; got (type|str)"):
            call()
    steps(tuning.model, torch.optim.Adam(own), range(1))
    with pytest.raises(CheckpointError, match=r"does not have the values of .*: '0\.lora\.a' differs"):
        tuning.load_optimizer(torch.optim.Adam(own), path)
    with pytest.raises(CheckpointError, match="There is no file"):
        tuning.load_optimizer(torch.optim.Adam(own), tmp_path / "none")


def test_a_site_named_like_the_optimizers_tensors_is_refused(tmp_path: Path) -> None:
    model = nn.Module()
    model.add_module("optimizer/x", nn.Linear(2, 2))
    model.forward = None  # type: ignore[assignment]
    del model.forward
    tuning = peftlib.attach(model, {"optimizer/x": LoRA(rank=1)})
    tuning.save(tmp_path / "t.safetensors")
    peftlib.load(copy.deepcopy(model), tmp_path / "t.safetensors", name="again")
    with pytest.raises(CheckpointError, match="Rename that module"):
        tuning.save(tmp_path / "t.safetensors", optimizer=torch.optim.Adam(tuning.parameters()))


def test_names_with_slashes_are_kept_apart(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("w", "w/k"):
                self.register_parameter(name, nn.Parameter(torch.zeros(2)))

        def forward(self, x: Tensor) -> Tensor:
            return x * sum(self.parameters())

    tuning = peftlib.attach(Two(), FullFineTuning())
    optimizer = Odd(tuning.parameters(), {})
    one, two = tuning.parameters()
    optimizer.state[one] = {"k/v": torch.ones(2), "k": torch.ones(1)}
    optimizer.state[two] = {"v": torch.full((2,), 3.0)}
    tuning.save(tmp_path / "t.safetensors", optimizer=optimizer)
    again = Odd(tuning.parameters(), {})
    tuning.load_optimizer(again, tmp_path / "t.safetensors")
    assert equal(again.state_dict()["state"], optimizer.state_dict()["state"])
