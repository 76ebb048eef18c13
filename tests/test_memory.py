"""Live bytes against programs small enough to count by hand, and estimates against measurements, to the byte.

Floats have 4 bytes. The loss and the gradient that backward starts from are two scalars, alive through the
backward: SCALARS bytes of activations.
"""

import gc
import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import optimizer as torch_optimizer
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import checkpoint

import peftlib
from peftlib.errors import PeftlibError, ProbeError
from peftlib.memory import (
    OUTSIDE,
    PARTS,
    LiveBytes,
    MemoryReport,
    default_loss,
    estimate_memory,
    measure_memory,
)

SCALARS = 8
ADAMW = torch.optim.AdamW


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors are tiny: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def parts(report):
    return {name: getattr(report, name) for name in PARTS if getattr(report, name)}


def check(report):
    """What holds for every report."""
    assert sum(parts(report).values()) == report.peak_bytes
    if report.modules:
        assert sum(report.modules.values()) == report.activation_bytes
    return report


def nbytes(tensors):
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def train_step(model, example, optimizer, loss=default_loss):
    """The loop that estimate_memory names, run once already so that the optimizer has its state."""
    kwargs = example if isinstance(example, dict) else {}
    args = () if isinstance(example, dict) else example if isinstance(example, tuple) else (example,)

    def step():
        output = model(*args, **kwargs)
        result = loss(output)
        result.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return step


# --- counted by hand -------------------------------------------------------------------------------------------


def test_elementwise_chain():
    w = nn.Parameter(torch.ones(1000))
    report = check(measure_memory(lambda: w.exp().sin().sum().backward()))
    # saved: exp's output, which is sin's input. The peak comes as sin's backward holds cos(a) and its product.
    assert parts(report) == {
        "trained_bytes": 4000,
        "activation_bytes": 4000 + SCALARS,
        "temporary_bytes": 8000,
    }
    assert report.peak_at == "backward"
    assert report.modules == {}


def test_linear():
    layer, x = nn.Linear(4, 4, bias=False), torch.ones(2, 4)
    report = check(measure_memory(lambda: layer(x).sum().backward(), model=layer))
    # the output is not saved by sum, and x was there before
    assert parts(report) == {
        "trained_bytes": 64,
        "gradient_bytes": 64,
        "input_bytes": 32,
        "activation_bytes": SCALARS,
    }
    assert (report.peak_at, report.modules) == ("backward of (root)", {OUTSIDE: SCALARS})


def test_peak_in_the_forward():
    x = torch.ones(100)

    def step():
        wide = x.expand(10, 100) * 2
        return wide.sum()

    assert parts(check(measure_memory(step))) == {"input_bytes": 400, "temporary_bytes": 4004}


def test_output_held_by_the_step_is_an_activation():
    w = nn.Parameter(torch.ones(1000))

    def held():
        output = w * 2
        output.sum().backward()

    report = check(measure_memory(held))
    # 2 is a number, so nothing is saved; the gradient is the product of the expanded scalar with it
    assert parts(report) == {
        "trained_bytes": 4000,
        "gradient_bytes": 4000,
        "activation_bytes": 4000 + SCALARS,
    }


def test_views_and_in_place_results_are_no_new_memory():
    with LiveBytes() as live:
        x = torch.zeros(16, 16)
        x.view(256)[3:].add_(1).mul_(2)
        x.t().detach().reshape(2, 8, 16).relu_()
        torch.sin(x, out=x)
    assert live.report().peak_bytes == 1024


def test_freed_storages_leave_the_count():
    def step():
        for _ in range(5):
            torch.zeros(256)
        a = torch.zeros(256)
        view = a[:1]
        del a
        return view, torch.zeros(256)

    assert measure_memory(step).peak_bytes == 2048


def test_resizing():
    def step():
        x = torch.empty(100)
        x.resize_(1000)
        x.untyped_storage().resize_(0)
        x.resize_(0)  # a storage resized by itself is noticed at its next use
        return torch.add(torch.ones(450), 1, out=x)

    assert measure_memory(step).peak_bytes == 4000


def test_new_tensors_are_not_inputs():
    def step():
        return torch.tensor([1.0, 2.0]), torch.arange(4), torch.randn(3)

    assert parts(measure_memory(step)) == {"temporary_bytes": 8 + 32 + 12}


def test_empty_step():
    assert measure_memory(lambda: None) == MemoryReport(peak_bytes=0, peak_at="start of the step")
    model = nn.Linear(4, 4)
    assert parts(measure_memory(lambda: None, model=model)) == {"trained_bytes": 80}


# --- what a storage is for -------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_and_trained(frozen):
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), torch.ones(4, 8)
    model[0].requires_grad_(not frozen)
    report = check(measure_memory(lambda: model(x).sum().backward(), model=model))
    assert report.frozen_bytes == (288 if frozen else 0)
    assert report.trained_bytes == (288 if frozen else 576)
    without_model = measure_memory(lambda: model(x).sum().backward())
    assert (without_model.frozen_bytes, without_model.trained_bytes) == (
        report.frozen_bytes,
        report.trained_bytes,
    )


@pytest.mark.parametrize(
    "make, states, scalars",
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), 0, 0),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 1, 0),
        (lambda p: torch.optim.Adagrad(p), 1, 1),
        (ADAMW, 2, 1),
        (lambda p: ADAMW(p, foreach=True, amsgrad=True), 3, 1),
    ],
)
@pytest.mark.parametrize("with_model", [True, False])
def test_optimizer_state(make, states, scalars, with_model):
    model, x = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)), torch.ones(4, 8)
    optimizer = make(model.parameters())
    weights = nbytes(model.parameters())

    def step():
        model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(2):  # the state is made in the first step and was there in the second
        report = check(measure_memory(step, model=model if with_model else None))
        assert report.trained_bytes == weights
        if report.peak_at == "optimizer step":
            assert report.gradient_bytes == weights
    assert report.optimizer_bytes == states * weights + 4 * 4 * scalars
    if states == 3:
        assert report.peak_at == "optimizer step"


def test_an_optimizer_that_keeps_its_state_elsewhere():
    class Momentum(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})
            self.memory = {}

        @torch.no_grad()
        def step(self):
            for w in self.param_groups[0]["params"]:
                self.memory[w] = w.grad + self.memory.get(w, 0)
                w -= 0.1 * self.memory[w]

    w = nn.Parameter(torch.ones(1000))
    optimizer = Momentum([w])

    def step():
        w.sum().backward()
        optimizer.step()

    report = measure_memory(step)
    assert report.optimizer_bytes == 4000
    assert report.peak_at == "optimizer step"


def test_a_closure_runs_its_forward_inside_the_step():
    model, x = nn.Linear(8, 8), torch.ones(4, 8)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def closure():
        optimizer.zero_grad()
        result = model(x).square().mean()
        result.backward()
        return result

    report = check(measure_memory(lambda: optimizer.step(closure), model=model))
    assert report.trained_bytes == 288
    assert report.optimizer_bytes > 0


def test_optimizer_in_the_backward_frees_gradients_early():
    def peak(in_backward):
        model, x = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6))), torch.ones(1, 64)
        optimizers = {w: torch.optim.SGD([w], lr=0.1) for w in model.parameters()}

        def update(w):
            optimizers[w].step()
            optimizers[w].zero_grad()

        if in_backward:
            for w in model.parameters():
                w.register_post_accumulate_grad_hook(update)
        return check(measure_memory(lambda: model(x).sum().backward(), model=model))

    assert peak(True).gradient_bytes <= 2 * 64 * 65 * 4
    assert peak(False).gradient_bytes == 6 * 64 * 65 * 4


def test_gradient_accumulation():
    w = nn.Parameter(torch.ones(1000))

    def step():
        for _ in range(2):
            (w * 2).sum().backward()

    report = check(measure_memory(step))
    # the second gradient lives beside the first until it is added
    assert parts(report) == {
        "trained_bytes": 4000,
        "gradient_bytes": 4000,
        "temporary_bytes": 4000,
        "activation_bytes": SCALARS,
    }


def test_gradients_of_an_earlier_step_count_from_the_start():
    w = nn.Parameter(torch.ones(1000))
    w.grad = torch.ones(1000)
    assert parts(measure_memory(lambda: w.detach() + 1)) == {
        "trained_bytes": 4000,
        "gradient_bytes": 4000,
        "temporary_bytes": 4000,
    }


def test_sparse_gradient():
    model = nn.Embedding(1000, 8, sparse=True)
    report = check(measure_memory(lambda: model(torch.arange(5)).sum().backward(), model=model))
    assert report.gradient_bytes == 5 * 8 + 5 * 8 * 4  # indices and values


def test_tied_weights_and_flat_buffers_count_once():
    flat = torch.zeros(200)
    model = nn.Module()
    model.a, model.b = nn.Parameter(flat[:100]), nn.Parameter(flat[100:], requires_grad=False)
    model.c = model.a
    report = measure_memory(lambda: (model.a * model.b).sum().backward(), model=model)
    assert (report.trained_bytes, report.frozen_bytes) == (800, 0)


def test_exchanged_weight_data_is_a_weight():
    w = nn.Parameter(torch.ones(1000))

    def step():
        kept = w.data
        w.data = torch.zeros(1000)
        (w * 2).sum().backward()
        w.data = kept

    assert measure_memory(step).trained_bytes == 8000


def test_buffers_are_frozen_weights_where_a_model_is_given():
    model, x = nn.BatchNorm1d(64), torch.randn(4, 64)
    assert measure_memory(lambda: model(x), model=model).frozen_bytes == 2 * 256 + 8
    assert measure_memory(lambda: model(x)).input_bytes == 2 * 256 + 8 + x.nbytes


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(x)))


class Stack(nn.Module):
    def __init__(self, mode=None):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(4))
        self.mode = mode

    def forward(self, x):
        for layer in self.layers:
            x = (
                layer(x)
                if self.mode is None
                else checkpoint(layer, x, use_reentrant=self.mode == "reentrant")
            )
        return x


@pytest.mark.parametrize("mode", ["reentrant", "non-reentrant"])
def test_checkpointing_keeps_one_block(mode):
    x = torch.randn(32, 16, requires_grad=True)
    plain, saving = (
        check(measure_memory(lambda model=model: model(x).sum().backward(), model=model))
        for model in (Stack(), Stack(mode))
    )
    inside = 2 * 32 * 64 * 4  # up's output and gelu's
    assert plain.activation_bytes >= 4 * inside
    # at most one block's inside (its backward has freed a part of it at the peak), and each block's input
    assert inside / 2 <= saving.activation_bytes <= inside + 6 * 32 * 16 * 4
    assert saving.peak_bytes < plain.peak_bytes
    assert {name for name, size in saving.modules.items() if name.endswith("up") and size} <= {
        "layers.0.up",
        "layers.3.up",
    }


def test_peak_while_recomputing():
    class Wasteful(nn.Module):
        def forward(self, x):
            torch.zeros(100_000)
            return x.exp()

    model, v, w = Wasteful(), nn.Parameter(torch.ones(1000)), nn.Parameter(torch.ones(10))

    def step():
        y = checkpoint(model, w, use_reentrant=False).sum()
        (y + (v * 1).sum()).backward()

    report = check(measure_memory(step, model=model))
    # as in the forward, but now the gradient of v exists: it was made later, so it comes first in the backward
    assert report.peak_at == "recomputation of (root)"
    assert (report.temporary_bytes, report.gradient_bytes) == (400_000, 4000)


def test_what_autograd_functions_keep_on_their_context_is_an_activation():
    class Keep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.kept = x * 2
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * ctx.kept

    w = nn.Parameter(torch.ones(1000))
    report = check(measure_memory(lambda: Keep.apply(w).sum().backward()))
    assert report.activation_bytes == 4000 + SCALARS


def test_transforms_keep_working():
    model, x = nn.Linear(8, 8), torch.ones(4, 8)
    report = check(measure_memory(lambda: torch.vmap(model)(x).sum().backward(), model=model))
    assert report.gradient_bytes == 288
    loss = lambda p: torch.func.functional_call(model, p, x).sum()  # noqa: E731
    measure_memory(lambda: torch.func.grad(loss)(dict(model.named_parameters())), model=model)


def test_in_place_errors_are_still_raised():
    w = nn.Parameter(torch.ones(3))

    def step():
        a = w.exp()
        result = a.sin().sum()
        a.add_(1)
        result.backward()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        measure_memory(step)


def test_wrapper_subclasses_count_by_their_parts():
    two_tensor = pytest.importorskip("torch.testing._internal.two_tensor").TwoTensor

    def step():
        x = two_tensor(torch.ones(100), torch.ones(100))
        return x * x

    assert measure_memory(step).peak_bytes == 1600


def test_modules_name_where_activations_were_made():
    model, x = Stack(), torch.randn(32, 16)
    report = check(measure_memory(lambda: model(x).sum().backward(), model=model))
    assert report.modules["layers.3"] == 32 * 64 * 4  # gelu's output
    assert report.modules["layers.3.up"] == 32 * 64 * 4
    assert report.modules["layers.0"] == 32 * 64 * 4 + 32 * 16 * 4  # and the sum, which is layers.1's input
    assert list(report.modules.values()) == sorted(report.modules.values(), reverse=True)
    assert report.peak_at == "backward of layers.3.down"


def test_collectable_cycles_do_not_make_it_random():
    def step():
        for _ in range(20):
            cycle = SimpleNamespace(x=torch.zeros(1000))
            cycle.me = cycle
            [[] for _ in range(2000)]
        gc.collect()

    assert measure_memory(step).peak_bytes == 80_000


# --- nothing stays behind --------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["forward", "backward", "optimizer", "nowhere"])
def test_nothing_is_left_behind(where):
    class Broken(nn.Module):
        def forward(self, x):
            if where == "forward":
                raise KeyError("forward")
            return x

    model, x = nn.Sequential(nn.Linear(8, 8), Broken()), torch.ones(4, 8)
    optimizer = ADAMW(model.parameters())

    def fail(_):
        raise KeyError("backward")

    def step():
        y = model(x)
        if where == "backward":
            y.register_hook(fail)
        y.sum().backward()
        if where == "optimizer":
            optimizer.register_step_pre_hook(lambda *_: fail(None))
        optimizer.step()

    if where == "nowhere":
        measure_memory(step, model=model)
    else:
        with pytest.raises(KeyError):
            measure_memory(step, model=model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(w._post_accumulate_grad_hooks for w in model.parameters())
    assert not torch_optimizer._global_optimizer_pre_hooks
    assert not torch_optimizer._global_optimizer_post_hooks
    assert not _get_current_dispatch_mode_stack()
    assert gc.isenabled()


def test_the_step_does_what_it_does_unmeasured():
    def trained(measured):
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8)), torch.randn(4, 8)
        step = train_step(model, x, ADAMW(model.parameters()))
        measure_memory(step, model=model) if measured else step()
        return model.state_dict()

    for a, b in zip(trained(True).values(), trained(False).values(), strict=True):
        assert torch.equal(a, b)


def test_same_step_same_bytes():
    model, x = Stack(), torch.randn(32, 16)
    step = train_step(model, x, ADAMW(model.parameters()))
    assert measure_memory(step, model=model) == measure_memory(step, model=model)


def test_wrong_arguments():
    with pytest.raises(PeftlibError, match="function that runs one training step"):
        measure_memory(torch.ones(3))
    with pytest.raises(PeftlibError, match="list"):
        measure_memory(lambda: None, model=[nn.Linear(2, 2)])


# --- estimate equals measure -----------------------------------------------------------------------------------


class Decoder(nn.Module):
    """Embedding, causal SDPA blocks, tied head."""

    def __init__(self, width=32, heads=4, layers=2, vocabulary=50):
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(vocabulary, width)
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.norm = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids, labels=None):
        x = self.embed(ids)
        for qkv, out, norm in zip(self.qkv, self.out, self.norm, strict=True):
            q, k, v = (
                part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in qkv(norm(x)).chunk(3, dim=-1)
            )
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + out(y.transpose(1, 2).flatten(2))
        logits = self.head(x)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return SimpleNamespace(logits=logits, loss=loss) if labels is not None else logits


def mlp():
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.1), nn.LayerNorm(64), nn.Linear(64, 8))
    return model, torch.randn(32, 16)


def decoder():
    ids = torch.randint(0, 50, (4, 24))
    return Decoder(), {"ids": ids, "labels": ids}


def convolutions():
    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, stride=2, groups=4), nn.GroupNorm(4, 32), nn.SiLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )
    return model, torch.randn(8, 3, 32, 32)


def encoder():
    layer = nn.TransformerEncoderLayer(32, 4, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(4, 10, 32)


def lora():
    model, example = decoder()
    peftlib.attach(model, peftlib.LoRA(rank=4), targets=["qkv.*", "out.*"])
    return model, example


MODELS = [
    mlp,
    decoder,
    convolutions,
    encoder,
    lora,
    lambda: (Stack("reentrant"), torch.randn(8, 16, requires_grad=True)),
    lambda: (Stack("non-reentrant"), torch.randn(8, 16)),
]


@pytest.mark.parametrize("make", MODELS, ids=lambda make: getattr(make, "__name__", "stack"))
@pytest.mark.parametrize("optimizer", [ADAMW, torch.optim.SGD])
def test_estimate_equals_measure(make, optimizer):
    model, example = make()
    estimate = check(estimate_memory(model, example, optimizer=optimizer))
    step = train_step(model, example, optimizer([w for w in model.parameters() if w.requires_grad]))
    assert estimate == check(measure_memory(step, model=model))


@pytest.mark.parametrize("make", [mlp, decoder, convolutions, encoder])
def test_the_allocator_agrees(make):
    """Independent of the tracker: the peak of what the CPU's allocator hands out, as the profiler records it."""
    model, example = make()
    step = train_step(model, example, ADAMW(model.parameters()))
    report = measure_memory(step, model=model)
    was_there = report.frozen_bytes + report.trained_bytes + report.optimizer_bytes + report.input_bytes
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    events = profile.profiler.kineto_results.events()
    allocated = max(itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]"))
    # more only by the workspace inside a kernel
    assert report.peak_bytes - was_there <= allocated <= 1.05 * (report.peak_bytes - was_there)


def test_estimate_takes_a_loss_and_no_optimizer():
    model, x = mlp()
    loss = lambda y: F.cross_entropy(y, y.detach().argmax(-1))  # noqa: E731
    estimate = estimate_memory(model, (x,), optimizer=None, loss=loss)

    def step():
        output = model(x)
        result = loss(output)
        result.backward()

    assert replace(estimate, modules={}) == replace(measure_memory(step, model=model), modules={})
    assert estimate.optimizer_bytes == 0


@settings(max_examples=15, deadline=None)
@given(
    widths=st.lists(st.integers(1, 33), min_size=2, max_size=5),
    batch=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    act=st.sampled_from([nn.ReLU, nn.GELU, nn.Tanh, nn.SiLU]),
    data=st.data(),
)
def test_any_mlp(widths, batch, dtype, act, data):
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b, dtype=dtype), act())]
    model, x = nn.Sequential(*layers), torch.randn(batch, widths[0], dtype=dtype)
    for w in model.parameters():
        w.requires_grad_(data.draw(st.booleans()))
    model[-2].bias.requires_grad_()
    trained = [w for w in model.parameters() if w.requires_grad]
    estimate = check(estimate_memory(model, x))
    assert estimate == check(measure_memory(train_step(model, x, ADAMW(trained)), model=model))
    assert estimate.trained_bytes == nbytes(trained)
    assert estimate.frozen_bytes == nbytes(model.parameters()) - nbytes(trained)


def test_lora_costs_what_it_says():
    model, example = lora()
    full, _ = decoder()
    saving, everything = estimate_memory(model, example), estimate_memory(full, example)
    tuned = 4 * peftlib.tunings(model)["default"].num_parameters
    assert saving.trained_bytes == tuned
    assert saving.frozen_bytes == everything.trained_bytes
    assert saving.optimizer_bytes == 2 * tuned + 4 * 2 * 4  # a step count for A and B at each of four sites
    assert saving.peak_bytes < everything.peak_bytes


def test_estimate_needs_no_memory():
    resource = pytest.importorskip("resource")
    used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # noqa: E731
    estimate_memory(*mlp())  # what is imported on first use
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(32768, 32768) for _ in range(4)))
    before = used()
    report = check(estimate_memory(model, torch.empty(100_000, 32768, device="meta")))
    assert report.peak_bytes > 100 * 2**30
    assert report.trained_bytes == 4 * 4 * 32768 * 32769
    assert used() - before < 100 * 1024  # KiB


def test_estimate_on_real_weights_copies_none():
    resource = pytest.importorskip("resource")
    model = nn.Linear(8192, 8192)  # 256 MiB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    estimate_memory(model, torch.empty(8, 8192))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


def test_meta_and_real_weights_estimate_the_same():
    ids = torch.zeros(2, 8, dtype=torch.long)
    with torch.device("meta"):
        meta = Decoder()
    assert estimate_memory(Decoder(), ids) == estimate_memory(meta, ids.to("meta"))


def test_estimate_leaves_the_model_and_the_generator_alone():
    model, x = convolutions()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.random.get_rng_state()
    estimate_memory(model, x)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(w.grad is None for w in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_estimate_keeps_shared_storage_shared():
    flat = torch.zeros(1000)
    model = nn.Linear(10, 10)
    model.weight = nn.Parameter(flat[:100].view(10, 10))
    model.bias = nn.Parameter(flat[500:510])
    x = torch.ones(3, 10)
    estimate = estimate_memory(model, x)
    assert estimate.trained_bytes == 4000
    assert estimate == measure_memory(train_step(model, x, ADAMW(model.parameters())), model=model)


def test_estimate_refuses():
    with pytest.raises(PeftlibError, match="attach a method first"):
        estimate_memory(nn.Linear(2, 2).requires_grad_(False), torch.ones(1, 2))

    class Asks(nn.Linear):
        def forward(self, x):
            return super().forward(x if x.sum().item() > 0 else -x)

    with pytest.raises(ProbeError, match="measure_memory"):
        estimate_memory(Asks(2, 2), torch.ones(1, 2))
    with pytest.raises(ProbeError, match="example="):
        estimate_memory(nn.Linear(2, 2), torch.ones(1, 3))
    with pytest.raises(ProbeError, match="loss="):
        estimate_memory(nn.Linear(2, 2), torch.ones(1, 2), loss=lambda y: y.long())
    assert not _get_current_dispatch_mode_stack()


def test_default_loss():
    assert default_loss({"loss": torch.tensor(3.0), "logits": torch.ones(2)}) == 3
    assert default_loss({"loss": None, "logits": torch.full((2,), 2.0)}) == 4
    assert default_loss(SimpleNamespace(loss=torch.tensor(1.0))) == 1
    with pytest.raises(PeftlibError, match="pass loss="):
        default_loss((torch.tensor([1]), None))


# --- the report ------------------------------------------------------------------------------------------------

REPORT = MemoryReport(
    peak_bytes=10 * 2**20,
    frozen_bytes=4 * 2**20,
    trained_bytes=2**20,
    gradient_bytes=2**20,
    optimizer_bytes=2 * 2**20,
    activation_bytes=2**20 + 2**19,
    temporary_bytes=2**19,
    peak_at="backward of layers.3.mlp",
    modules={"layers.3.mlp": 2**20, "": 2**18, OUTSIDE: 2**18},
)


def test_report_prints_as_a_table():
    assert str(REPORT) == (
        "Peak memory of one step (cpu)\n"
        "part                 bytes   share\n"
        "---------------  ---------  ------\n"
        "frozen weights     4.0 MiB  40.00%\n"
        "trained weights    1.0 MiB  10.00%\n"
        "gradients          1.0 MiB  10.00%\n"
        "optimizer state    2.0 MiB  20.00%\n"
        "activations        1.5 MiB  15.00%\n"
        "temporaries      512.0 KiB   5.00%\n"
        "inputs                 0 B   0.00%\n"
        "---------------  ---------  ------\n"
        "peak              10.0 MiB       -\n"
        "reached in: backward of layers.3.mlp\n"
        "\n"
        "activations of           bytes\n"
        "-------------------  ---------\n"
        "layers.3.mlp           1.0 MiB\n"
        "(root)               256.0 KiB\n"
        "(outside the model)  256.0 KiB"
    )
    assert REPORT._repr_html_().count("<table>") == 2


def test_report_names_what_it_leaves_out_and_cuda():
    text = str(replace(REPORT, modules={f"layers.{i}": i for i in range(20)}, cuda_peak_bytes=2**20))
    assert "and 12 more" in text
    assert "CUDA's allocator at its own peak: 1.0 MiB" in text


def test_report_to_dict_is_json():
    read = json.loads(json.dumps(REPORT.to_dict()))
    assert read["peak_bytes"] == 10 * 2**20
    assert read["cuda_peak_bytes"] is None
    assert MemoryReport(**read) == REPORT


def test_report_is_frozen():
    with pytest.raises(AttributeError):
        REPORT.peak_bytes = 3


def test_report_plots(tmp_path):
    REPORT.plot(tmp_path / "peak.png")
    assert (tmp_path / "peak.png").stat().st_size > 1000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda():
    model, x = Decoder().cuda(), torch.zeros(4, 24, dtype=torch.long, device="cuda")
    report = check(measure_memory(train_step(model, x, ADAMW(model.parameters())), model=model))
    assert report.device == "cuda:0"
    assert report.cuda_peak_bytes >= report.peak_bytes


def test_tunings_that_are_off_take_their_bytes_in_the_estimate_too():
    def make():
        model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
        for name in "ab":
            peftlib.attach(model, peftlib.LoRA(rank=2), targets=[nn.Linear], name=name)
        peftlib.use(model, "b")
        return model

    x = torch.randn(3, 16)
    model = make()
    for parameter in peftlib.tunings(model)["a"].parameters():
        parameter.requires_grad_(False)
    estimate = estimate_memory(model, x)
    peftlib.tunings(model)["a"].detach()
    assert estimate.frozen_bytes - estimate_memory(model, x).frozen_bytes == 4 * 2 * (16 + 16 + 16 + 4)
