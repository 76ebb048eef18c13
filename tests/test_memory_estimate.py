"""What estimate_memory does besides: micro-batches, checkpointing, autocast, hints, workspaces, extrapolation."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import peftlib
from peftlib.errors import PeftlibError, ProbeError, TargetError
from peftlib.memory import MemoryReport, checkpointed, estimate_memory, extrapolate, measure_memory, onednn
from tests.zoo import Decoder, Recycled, ids


def tower(width=32, depth=4):
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth)))


# --- accumulation ------------------------------------------------------------------------------------------------


def test_accumulated_gradients_are_there_in_the_next_forward():
    model, x = tower(), torch.randn(256, 32)
    one, two, nine = (estimate_memory(model, x, accumulate=n) for n in (1, 2, 9))
    weights = one.trained_bytes
    assert one.gradient_bytes < weights
    assert two.gradient_bytes == weights
    assert two == nine


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "2"])
def test_accumulate_is_a_number_of_batches(wrong):
    with pytest.raises(PeftlibError, match="accumulate="):
        estimate_memory(tower(), torch.randn(2, 32), accumulate=wrong)


# --- checkpointing -----------------------------------------------------------------------------------------------


def test_checkpointing_is_what_the_model_would_do_itself():
    # the zoo's decoder that checkpoints each block, against ours around the one that does not
    own, ours = Decoder(checkpointed=True), Decoder()
    assert (
        estimate_memory(own, ids()).peak_bytes
        == estimate_memory(ours, ids(), checkpointing="blocks.*").peak_bytes
    )
    assert estimate_memory(ours, ids(), checkpointing=True) == estimate_memory(
        ours, ids(), checkpointing="blocks.*"
    )


def test_checkpointed_computes_the_same_gradients():
    def gradients(where):
        torch.manual_seed(0)
        model = Decoder().double()
        parts = {"mlp.*": peftlib.LoRA(rank=2), "attn": peftlib.PTuningV2(length=2)}
        peftlib.attach(model, parts, example=ids())
        with checkpointed(model, where) as names:
            model(ids()).square().mean().backward()
        return names, [p.grad for p in model.parameters() if p.requires_grad]

    torch.manual_seed(1)
    _, plain = gradients(None)
    torch.manual_seed(1)
    names, again = gradients(True)
    assert names == ["blocks.0", "blocks.1"]
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_checkpointed_computes_again_and_leaves_nothing():
    model, x = tower(), torch.randn(4, 32)
    calls = []
    model[1][0].register_forward_hook(lambda *_: calls.append(1))
    with checkpointed(model, lambda name, _: name in ("0", "1")) as names:
        model(x).sum().backward()
    assert (names, len(calls)) == (["0", "1"], 2)
    assert not any("forward" in m.__dict__ for m in model.modules())
    with pytest.raises(KeyError), checkpointed(model, nn.Sequential):
        raise KeyError
    assert "forward" not in model[0].__dict__
    model[0].forward = lambda x: x * 2  # a forward of its own comes back
    mine = model[0].forward
    with checkpointed(model, lambda name, _: name == "0"):
        pass
    assert model[0].forward is mine


def test_what_lies_inside_is_not_checkpointed_twice():
    with checkpointed(tower(), [nn.Sequential, "*.0"]) as names:
        assert names == [""]
    with checkpointed(Recycled(), "first") as names:
        assert names == ["first"]


def test_checkpointing_that_matches_nothing():
    with pytest.raises(TargetError, match=r"repeated blocks.*Linear has none.*'encoder"):
        estimate_memory(nn.Linear(2, 2), torch.ones(1, 2), checkpointing=True)
    with pytest.raises(TargetError, match="'blcks' matches nothing"):
        estimate_memory(Decoder(), ids(), checkpointing="blcks")
    with pytest.raises(TargetError, match="matches no module of Decoder"):
        estimate_memory(Decoder(), ids(), checkpointing=nn.LSTM)


class Cached(nn.Module):
    """Concatenates to a cache that it keeps, as generation does: more is there when it is computed again."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, cache):
        x = self.linear(x)
        if cache is not None:
            cache.append(x)
            x = torch.cat(cache).tanh().sum(0, keepdim=True)
        return x


class Caching(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Cached() for _ in range(2))

    def forward(self, x, use_cache=True):
        cache = [] if use_cache else None
        for block in self.blocks:
            x = block(x, cache)
        return x


def test_checkpointing_of_what_fills_a_cache():
    model, x = Caching(), torch.ones(2, 4)
    assert estimate_memory(model, x).peak_bytes
    assert estimate_memory(model, {"x": x, "use_cache": False}, checkpointing=True).peak_bytes
    with pytest.raises(TargetError, match=r"^checkpointing=True does not work in Caching.*use_cache=False"):
        estimate_memory(model, x, checkpointing=True)
    # a plan goes on without these rows
    plan = peftlib.plan_memory(Caching, x, {"full": None}, "1MiB")
    assert [row["checkpoint"] for row in plan.rows] == ["no"]
    assert any(note.startswith("without checkpointing: checkpointing=True does not") for note in plan.notes)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"optimizer": "adamw"}, r"optimizer= is str: give what makes one"),
        (
            {"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(1))])},
            r"optimizer= is SGD: give what makes one",
        ),
        ({"loss": "mse"}, r"loss= is str: give a function"),
        ({"loss": lambda output: 3.0}, r"the loss is float: it has to be a scalar"),
        ({"loss": lambda output: output}, r"the loss is torch.float32 of shape \(2, 32\): it has to be"),
        ({"loss": lambda output: output.detach().sum()}, r"of shape \(\) without a gradient: it has to be"),
    ],
)
def test_optimizers_and_losses_that_are_none(wrong, message):
    with pytest.raises(PeftlibError, match=message):
        estimate_memory(tower(), torch.ones(2, 32), **wrong)


def test_a_failing_step_is_an_error_and_no_log(caplog):
    with pytest.raises(ProbeError, match=r"in '0\.0', RuntimeError"):
        estimate_memory(tower(), torch.ones(2, 31))
    assert not caplog.records


# --- autocast ----------------------------------------------------------------------------------------------------


def test_autocast_halves_what_is_kept():
    model, x = tower(64, 6), torch.randn(512, 64)
    plain, cast = estimate_memory(model, x), estimate_memory(model, x, autocast=torch.bfloat16)
    assert cast.trained_bytes == plain.trained_bytes
    assert cast.activation_bytes < 0.8 * plain.activation_bytes
    with pytest.raises(PeftlibError, match="autocast="):
        estimate_memory(model, x, autocast=torch.int8)


# --- what fake tensors cannot know ---------------------------------------------------------------------------------


class Asks(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(4, 4)
        self.inner = nn.ModuleList([Route()])

    def forward(self, x):
        return self.inner[0](self.gate(x))


class Route(nn.Module):
    def __init__(self):
        super().__init__()
        self.small, self.large = nn.Linear(4, 4), nn.Linear(4, 400)

    def forward(self, x):
        return self.large(x) if x.sum() > 0 else self.small(x)


def test_a_question_for_a_value_names_the_module_and_two_ways_out():
    with pytest.raises(ProbeError, match=r"in 'inner.0'.*asks a tensor for its value.*hint=.*extrapolate"):
        estimate_memory(Asks(), torch.ones(2, 4))
    assert not _get_current_dispatch_mode_stack()


def test_a_hint_answers():
    model, x = Asks(), torch.ones(2, 4)
    yes, no = (estimate_memory(model, x, hint=answer) for answer in (True, False))
    assert yes.activation_bytes > no.activation_bytes
    assert yes == estimate_memory(model, x, hint=lambda tensor: tensor.dim() == 0)
    assert any(
        "'inner.0' asked a tensor for its value and got the hint's: True" in note for note in yes.notes
    )
    # the way that a real step takes is the way of its hint, to the byte
    for bias, estimate in ((10.0, yes), (-10.0, no)):
        nn.init.constant_(model.gate.bias, bias)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

        def step(optimizer=optimizer):
            output = model(x)
            result = output.square().mean()
            result.backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        real = measure_memory(step, model=model)
        assert real.asked == ("inner.0",)
        assert (
            estimate_memory(model, x, hint=bias > 0, optimizer=lambda p: torch.optim.SGD(p, lr=0.0)) == real
        )
        assert estimate.peak_bytes > 0


def test_a_measurement_says_that_a_tensor_was_asked():
    model, x = Asks(), torch.ones(2, 4)
    (note,) = measure_memory(lambda: model(x), model=model).notes
    assert note.startswith("'inner.0' asked a tensor for its value; an estimate may go another way")
    assert note in str(measure_memory(lambda: model(x), model=model))
    assert measure_memory(lambda: model.gate(x), model=model).notes == ()


@pytest.mark.parametrize(
    "part, asking",
    [
        ("the optimizer's step", {"optimizer": torch.optim.Adafactor}),
        ("the loss", {"loss": lambda y: y.sum() if y.mean() > 0 else -y.sum()}),
        ("the loss", {"loss": lambda y: y.sum() * (2 if torch.equal(y, y + 1) else 1)}),
        ("the loss", {"loss": lambda y: Doubling.apply(y).sum() * y.mean().item()}),
        ("the backward", {"loss": lambda y: Doubling.apply(y).sum()}),
    ],
    ids=["optimizer", "if", "equal", "item", "backward"],
)
def test_a_question_outside_the_model_names_its_part_of_the_step(part, asking):
    model, x = tower(), torch.ones(2, 32)
    with pytest.raises(ProbeError, match=rf"^in {part}, .*asks a tensor for its value.*hint=.*extrapolate"):
        estimate_memory(model, x, **asking)
    report = estimate_memory(model, x, hint=1.0, **asking)
    (note,) = report.notes
    assert part in note
    assert note.endswith("asked a tensor for its value and got the hint's: 1.0")


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, g):
        return g * (2 if g.sum() > 0 else 3)


def test_an_answer_about_equality_is_a_bool():
    answers = []

    def loss(y):
        answers.append(torch.equal(y, y * 2))
        return y.sum()

    estimate_memory(tower(), torch.ones(2, 32), loss=loss, hint=lambda tensor: tensor.dim())
    assert answers == [True, True]
    with pytest.raises(ProbeError, match=r"in the loss, AttributeError: .*nope"):
        estimate_memory(tower(), torch.ones(2, 32), loss=lambda y: y.nope)


# --- a workspace that only oneDNN knows ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "length, batch, inputs, width, more",
    [(1, 1, 1, 1, {}), (17, 5, 40, 3, {"num_layers": 2}), (40, 2, 17, 100, {"bidirectional": True})],
)
@pytest.mark.parametrize("batch_first", [False, True])
def test_an_lstm_keeps_what_onednn_keeps(length, batch, inputs, width, more, batch_first):
    model = nn.LSTM(inputs, width, batch_first=batch_first, **more)
    x = torch.randn(length, batch, inputs)
    assert estimate_memory(model, x, optimizer=None) == measure_memory(
        forward_backward(model, x), model=model
    )


def test_a_long_lstm_continues_the_line(monkeypatch):
    monkeypatch.setattr(onednn, "TRIED", 2**22)
    onednn._workspace.cache_clear()
    model, x = nn.LSTM(64, 64), torch.randn(100, 50, 64)
    sizes = []
    monkeypatch.setattr(onednn, "LSTM", lambda tokens, *a: sizes.append(len(tokens)) or LSTM(tokens, *a))
    estimate = estimate_memory(model, x, optimizer=None)
    onednn._workspace.cache_clear()
    real = measure_memory(forward_backward(model, x), model=model)
    if "aten.mkldnn_rnn_layer.default" not in real.operations:
        pytest.skip("built without oneDNN")
    assert len(sizes) == 2
    assert max(sizes) < 50
    assert estimate.peak_bytes == pytest.approx(real.peak_bytes, rel=0.02)


LSTM = onednn.LSTM


def forward_backward(model, x):
    def step():
        output = model(x)
        result = output[0].square().mean()
        result.backward()
        model.zero_grad()

    return step


def test_a_shape_that_depends_on_values():
    class Picks(nn.Linear):
        def forward(self, x):
            return super().forward(x[x[:, 0] > 0])

    with pytest.raises(ProbeError, match=r"in the root.*shape depends on values.*extrapolate"):
        estimate_memory(Picks(4, 4), torch.ones(2, 4))


def test_lazy_modules_have_no_size():
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3))
    with pytest.raises(PeftlibError, match=r"'1.weight' has no size yet.*Run the model once.*nn\.Linear"):
        estimate_memory(model, torch.ones(2, 4))
    model(torch.ones(2, 4))
    assert estimate_memory(model, torch.ones(2, 4)).trained_bytes == (20 + 15) * 4


def test_wrong_losses_and_devices():
    model, x = tower(), torch.ones(2, 32)
    with pytest.raises(ProbeError, match=r"shape \(2, 32\).*has to be a scalar"):
        estimate_memory(model, x, loss=lambda y: y)
    with pytest.raises(ProbeError, match="without a gradient"):
        estimate_memory(model, x, loss=lambda y: y.detach().sum())
    with pytest.raises(PeftlibError, match="estimated for 'cpu' and for 'cuda'"):
        estimate_memory(model, x, device="meta")
    with pytest.raises(PeftlibError, match="no device"):
        estimate_memory(model, x, device="gpu0")
    with pytest.raises(PeftlibError, match=r"needs an nn\.Module; got list"):
        estimate_memory([model], x)


# --- size ----------------------------------------------------------------------------------------------------------


def test_extrapolation_is_exact_where_bytes_are_polynomials():
    def report(batch, length, depth):
        return estimate_memory(
            Decoder(depth=depth), torch.zeros(batch, length, dtype=torch.long), optimizer=None
        )

    small = {"batch": (8, 16), "length": (4, 5, 6), "depth": (2, 3)}
    there = {"batch": 64, "length": 10, "depth": 7}
    continued = extrapolate(report, small, there)
    assert continued.parts() == report(**there).parts()
    assert "continued to batch 64 from (8, 16), length 10 from (4, 5, 6), depth 7 from (2, 3)" in str(
        continued
    )
    with pytest.raises(PeftlibError, match="no timeline"):
        continued.plot_timeline("x.png")


def test_extrapolation_follows_the_peak_to_another_moment():
    """At a small batch the optimizer's step dominates, or the last gradients, at a large one the activations."""

    def step(batch, optimizer):
        return estimate_memory(tower(64, 3), torch.randn(batch, 64), optimizer=optimizer)

    for optimizer, place in ((torch.optim.AdamW, "optimizer step"), (None, "backward")):
        small, large = step(4, optimizer), step(4096, optimizer)
        assert small.peak_at.startswith(place)
        assert not large.peak_at.startswith("optimizer")
        continued = extrapolate(
            lambda batch: step(batch, optimizer),  # noqa: B023
            {"batch": (2, 4)},
            {"batch": 4096},
        )
        assert continued.parts() == large.parts()
        assert continued.peak_at.partition(" ")[0] == large.peak_at.partition(" ")[0]
        assert continued.notes == ["continued to batch 4096 from (2, 4)"]
        # the line of the small peaks alone ends far below
        line = small.peak_bytes + (small.peak_bytes - step(2, optimizer).peak_bytes) * (4096 - 4) // 2
        assert line < large.peak_bytes / 1.3


class Heavy(torch.optim.SGD):
    """Its step takes 300 KiB."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.1)

    @torch.no_grad()
    def step(self, closure=None):
        scratch = torch.empty(300 * 256)
        super().step(closure)
        del scratch


def test_extrapolation_over_depth_continues_each_phase():
    """A shallow tower's peak is in the step; the activations of a deep one overtake it."""

    def step(depth):
        model = nn.Sequential(nn.Linear(64, 64), *(nn.ReLU() for _ in range(depth)))
        return estimate_memory(model, torch.randn(64, 64), optimizer=Heavy)

    small, large = step(3), step(60)
    assert small.peak_at == "optimizer step"
    assert large.peak_at.startswith("backward")
    continued = extrapolate(step, {"depth": (2, 3)}, {"depth": 60})
    assert continued.parts() == large.parts()
    assert any("in different places (backward, optimizer step)" in note for note in continued.notes)


def test_extrapolation_of_reports_without_timelines_continues_the_peaks():
    def step(batch):
        return MemoryReport(peak_bytes=7 + batch, frozen_bytes=7, input_bytes=batch, peak_at="forward")

    continued = extrapolate(step, {"batch": (1, 2)}, {"batch": 9})
    assert (continued.peak_bytes, continued.frozen_bytes, continued.peak_at) == (16, 7, "forward")


def test_extrapolation_refuses():
    def report(width):
        raise AssertionError

    with pytest.raises(PeftlibError, match="two or more"):
        extrapolate(report, {"width": (8, 8)}, {"width": 4})
    with pytest.raises(PeftlibError, match="give both the same"):
        extrapolate(report, {"width": (8, 16)}, {"batch": 4})
