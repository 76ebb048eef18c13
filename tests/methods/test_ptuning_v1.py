"""P-Tuning v1: its encoder, its published sizes, rows cached while gradients are off, and templates with placeholders.

Shapes: B batch, P virtual tokens, T tokens, D width, h hidden, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import peftlib
from peftlib import LoRA, PTuningV1, attach
from peftlib.errors import PeftlibError, TargetError
from peftlib.methods.ptuning_v1 import PromptEncoder
from peftlib.methods.rows import FrozenCache
from tests.methods.prompts import Decoder, V, naive, prepended, visible
from tests.twin import assert_twins, assert_untouched, classes, randomize, snapshot

B, T, P, D = 3, 5, 3, 8
IDX = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(7))
ENCODERS = ["lstm", "mlp"]


def encoder_of(tuning: peftlib.Tuning) -> PromptEncoder:
    return next(m for part in tuning.parts for m in part.delta.modules() if isinstance(m, PromptEncoder))


# -- the encoder -------------------------------------------------------------------------------------------------------


def lstm_by_hand(lstm: nn.LSTM, x_PD: Tensor) -> Tensor:
    """A bidirectional LSTM, gate by gate."""
    for layer in range(lstm.num_layers):
        sides = []
        for side in ("", "_reverse"):
            w_ih, w_hh, b_ih, b_hh = (
                getattr(lstm, f"{name}_l{layer}{side}")
                for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            h = c = torch.zeros(lstm.hidden_size, dtype=x_PD.dtype)
            outs = []
            for x in x_PD.flip(0) if side else x_PD:
                i, f, g, o = (w_ih @ x + b_ih + w_hh @ h + b_hh).chunk(4)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
                outs.append(h)
            sides.append(torch.stack(outs[::-1] if side else outs))
        x_PD = torch.cat(sides, -1)
    return x_PD


def encoded_by_hand(encoder: PromptEncoder) -> Tensor:
    x = encoder.table
    if encoder.lstm is not None:
        x = lstm_by_hand(encoder.lstm, x)
    linears = [m for m in encoder.mlp if isinstance(m, nn.Linear)]
    for i, linear in enumerate(linears):
        x = x @ linear.weight.T + linear.bias
        x = x.clamp_min(0) if i < len(linears) - 1 else x
    return x


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("hidden", [None, 5])
def test_the_model_with_encoded_rows_is_its_twin(encoder, hidden):
    model = Decoder()
    tuning = attach(model, PTuningV1(length=P, encoder=encoder, hidden=hidden), example=IDX)
    leaves = randomize(tuning, 0.5)
    seen, where = (
        visible(torch.ones(T, T).tril().bool().expand(B, T, T), P, False),
        torch.arange(P + T).expand(B, -1),
    )

    def twin() -> Tensor:
        return naive(model, prepended(model, encoded_by_hand(encoder_of(tuning)), IDX), seen, where)[:, P:]

    assert_twins(lambda: model(IDX), twin, leaves, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_rows_are_those_of_hf_peft(encoder):
    peft = pytest.importorskip("peft")
    from peft.tuners.p_tuning.model import PromptEncoder as Theirs

    h = 6
    config = peft.PromptEncoderConfig(
        num_virtual_tokens=P,
        token_dim=D,
        encoder_hidden_size=h,
        encoder_reparameterization_type=encoder.upper(),
        num_transformer_submodules=1,
        encoder_dropout=0.0,
    )
    theirs = Theirs(config)
    ours = PromptEncoder(PTuningV1(length=P, encoder=encoder, hidden=h), D)
    with torch.no_grad():
        ours.table.copy_(theirs.embedding.weight)
    ours.mlp.load_state_dict(theirs.mlp_head.state_dict())
    if ours.lstm is not None:
        ours.lstm.load_state_dict(theirs.lstm_head.state_dict())
    assert torch.equal(ours(), theirs(torch.arange(P)[None])[0])
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def sizes(encoder: str, P: int, D: int, h: int) -> int:
    """The formulas of PTuningV1's docstring."""
    if encoder == "mlp":
        return P * D + (D + 1) * h + (h + 1) * h + (h + 1) * D
    return P * D + 8 * h * (D + h + 2) + 8 * h * (3 * h + 2) + (2 * h + 1) * 2 * h + (2 * h + 1) * D


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("P, D, h", [(1, 2, 1), (3, 8, None), (20, 768, 300), (250, 1024, None)])
def test_sizes_are_the_formulas(encoder, P, D, h):
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(50, D), nn.LSTM(D, 2, batch_first=True))
    tuning = attach(
        model, PTuningV1(length=P, encoder=encoder, hidden=h), example=torch.zeros(1, 4, dtype=torch.long)
    )
    h = h or (max(1, D // 2) if encoder == "lstm" else D)
    assert tuning.num_parameters == sizes(encoder, P, D, h)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_folding_keeps_the_rows_alone(encoder, tmp_path):
    model = Decoder()
    fresh = copy.deepcopy(model)
    tuning = attach(model, PTuningV1(length=P, encoder=encoder, hidden=5), example=IDX)
    randomize(tuning, 0.5)
    before = model(IDX)
    tuning.fold()
    assert [tuple(p.shape) for p in tuning.parameters()] == [(P, D)]
    assert all(p.requires_grad for p in tuning.parameters())
    torch.testing.assert_close(model(IDX), before)
    with pytest.raises(PeftlibError, match="no reparametrization to fold"):
        tuning.fold()
    tuning.save(tmp_path / "folded.safetensors")
    peftlib.load(fresh, tmp_path / "folded.safetensors")
    assert torch.equal(fresh(IDX), model(IDX))


def test_folding_what_is_not_trained_leaves_it_so(tmp_path):
    model = Decoder()
    tuning = attach(model, PTuningV1(length=P, encoder="mlp"), example=IDX)
    tuning.save(tmp_path / "prompt.safetensors")
    tuning.detach()
    served = peftlib.load(model, tmp_path / "prompt.safetensors", trainable=False).fold()
    assert not any(p.requires_grad for p in served.parameters())


def test_dropout_is_between_the_lstm_layers_in_training():
    model = Decoder()
    tuning = attach(model, PTuningV1(length=P, dropout=0.5), example=IDX)
    randomize(tuning, 0.5)
    encoder = encoder_of(tuning)
    assert encoder.lstm is not None
    assert encoder.lstm.dropout == 0.5
    assert not torch.equal(model(IDX), model(IDX))
    with torch.no_grad():
        assert not torch.equal(model(IDX), model(IDX))
        model.eval()
        assert torch.equal(model(IDX), model(IDX))
        torch.testing.assert_close(encoder(), encoded_by_hand(encoder))


# -- rows are computed once --------------------------------------------------------------------------------------------


class Counter:
    """Counts runs of the encoder."""

    def __init__(self) -> None:
        self.calls = 0
        self.compute = PromptEncoder._compute

    def __call__(self, encoder: PromptEncoder) -> Tensor:
        self.calls += 1
        return self.compute(encoder)


@pytest.fixture
def counter() -> Iterator[Counter]:
    counting = Counter()
    with patch.object(PromptEncoder, "_compute", lambda self: counting(self)):
        yield counting


class Recurrent(nn.Module):
    """A model of any dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.tok, self.gru, self.head = nn.Embedding(V, D), nn.GRU(D, D, batch_first=True), nn.Linear(D, V)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.gru(self.tok(ids))[0])


@pytest.fixture
def model() -> Recurrent:
    return Recurrent().double().eval()


@pytest.fixture
def tuning(model: Recurrent) -> peftlib.Tuning:
    made = attach(model, PTuningV1(length=P, encoder="mlp", hidden=5), example=IDX)
    randomize(made, 0.5)
    return made


def runs(counter: Counter, model: nn.Module, times: int = 1) -> int:
    """How often the encoder runs in calls without gradients; each must give what a fresh computation gives."""
    before = counter.calls
    with torch.no_grad():
        outs = [model(IDX) for _ in range(times)]
    found = counter.calls - before
    expected = copy.deepcopy(model)(IDX).detach()  # copies and calls with gradients compute anew
    for out in outs:
        torch.testing.assert_close(out, expected, rtol=0, atol=0)
    return found


def test_rows_are_computed_once_without_gradients_and_each_time_with(model, tuning, counter):
    assert runs(counter, model, 4) == 1
    assert runs(counter, model, 2) == 0
    before = counter.calls
    model(IDX)
    model(IDX)
    assert counter.calls - before == 2
    with torch.inference_mode():
        model(IDX)
        model(IDX)
    assert counter.calls - before == 3


def test_generation_computes_them_once(model, tuning, counter):
    ids = IDX
    with torch.no_grad():
        for _ in range(6):
            ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
    assert counter.calls == 1


CHANGES = {
    "an optimizer's step": lambda m, t: step(m, t),
    "a write in place": lambda m, t: [p.add_(1) for p in t.parameters()],
    "loaded values": lambda m, t: t.load_state_dict({k: v + 1 for k, v in t.state_dict().items()}),
    "another dtype": lambda m, t: m.float(),
    "there and back": lambda m, t: m.bfloat16().double(),
    "a fold": lambda m, t: t.fold(),
}


def step(model: nn.Module, tuning: peftlib.Tuning) -> None:
    optimizer = torch.optim.AdamW(tuning.parameters(), lr=0.1)
    with torch.enable_grad():
        model(IDX).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_a_parameter_computes_them_anew(model, tuning, counter, change):
    runs(counter, model)
    before = model(IDX).detach()
    with torch.no_grad():
        CHANGES[change](model, tuning)
    runs(counter, model, 2)  # compares with a fresh computation
    if change not in ("a fold", "another dtype"):
        assert not torch.equal(model(IDX), before)


def test_a_copy_starts_without_the_rows_of_the_original(model, tuning, counter):
    runs(counter, model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        next(iter(peftlib.tunings(twin)["default"].parameters())).mul_(2)
    assert runs(counter, twin) == 1
    assert runs(counter, model) == 0


def test_autocast_does_not_mark_the_cache(model, tuning, counter):
    model.float()
    with torch.no_grad():
        exact = model(IDX)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = encoder_of(tuning)()
            assert rounded.dtype == torch.bfloat16
        assert torch.equal(model(IDX), exact)


def test_an_address_used_again_is_no_old_value():
    cache, computed = FrozenCache(), []

    def compute() -> Tensor:
        computed.append(None)
        return parameter.detach().clone()

    with torch.no_grad():
        for i in range(20):
            # Freed and allocated again, at the same address as often as not; version and dtype do not differ.
            parameter = nn.Parameter(torch.full((64,), float(i)))
            assert torch.equal(cache((parameter,), compute), parameter)
    assert len(computed) == 20


def test_fake_and_meta_parameters_are_not_cached():
    cache = FrozenCache()
    with FakeTensorMode() as mode, torch.no_grad():
        fake = mode.from_tensor(torch.ones(3))
        assert cache((fake,), lambda: fake + 1).shape == (3,)
    with torch.no_grad():
        meta = torch.ones(3, device="meta")
        assert cache((meta,), lambda: meta + 1).is_meta


# -- placeholders ------------------------------------------------------------------------------------------------------

OUTSIDE = V + 4
"""An id that the vocabulary does not have."""


def replaced(model: Decoder, rows_PD: Tensor, ids: Tensor, placeholder: int) -> Tensor:
    """The embeddings of templates, position by position."""
    out = []
    for sequence in ids.tolist():
        k = 0
        vectors = []
        for i in sequence:
            vectors.append(rows_PD[k] if i == placeholder else model.tok.weight[i])
            k += i == placeholder
        out.append(torch.stack(vectors))
    return torch.stack(out)


@pytest.mark.parametrize("encoder", [*ENCODERS, "none"])
@pytest.mark.parametrize("placeholder", [OUTSIDE, V - 1])
def test_templates_of_any_form(encoder, placeholder):
    model = Decoder()
    p = placeholder
    ids = torch.tensor(
        [
            [p, p, p, 1, 2, 3, 4],  # in front
            [1, p, 2, p, 3, p, 4],  # between
            [1, 2, 3, 4, p, p, p],  # behind
            [p, 1, 2, p, p, 0, 0],  # and padding
            [1, 2, 3, 4, 5, 6, 7],  # no template at all
        ]
    )
    tuning = attach(
        model, PTuningV1(length=P, encoder=encoder, placeholder_id=p), targets=["tok"], freeze=False
    )
    assert list(tuning.sites) == ["tok"]
    leaves = randomize(tuning, 0.5) | {"tok": model.tok.weight, "head": model.head.weight}
    delta = tuning.parts[0].delta
    seen, where = torch.ones(7, 7).tril().bool().expand(5, 7, 7), torch.arange(7).expand(5, 7)

    def twin() -> Tensor:
        rows = delta.prompt.rows if encoder == "none" else encoded_by_hand(delta.prompt)
        return naive(model, replaced(model, rows, ids, p), seen, where)

    assert_twins(lambda: model(ids), twin, leaves, rtol=1e-8, atol=1e-9)


def test_a_template_without_a_batch():
    model = Decoder()
    randomize(attach(model, PTuningV1(length=2, placeholder_id=OUTSIDE), targets=["tok"]))
    ids = torch.tensor([1, OUTSIDE, OUTSIDE, 2])
    torch.testing.assert_close(model(ids), model(ids[None])[0])


def test_a_template_needs_no_example_and_takes_one():
    method = PTuningV1(length=P, placeholder_id=OUTSIDE)
    assert list(attach(Recurrent(), method).sites) == ["tok"]
    model = Decoder()
    with pytest.raises(TargetError, match="3 embeddings: 'tok', 'types', 'pos'; name the one"):
        attach(model, method)
    tuning = attach(model, method, example=IDX)
    assert list(tuning.sites) == ["tok"]


def test_a_probe_with_templates_stays_fake():
    with torch.device("meta"):
        model = Decoder()
    attach(model, PTuningV1(length=P, placeholder_id=OUTSIDE), targets=["tok"])
    # Another tuning looks at a template while the first is on the model.
    attach(model, LoRA(rank=1), targets=["out"], name="lora", example=torch.tensor([[OUTSIDE] * P]))


@pytest.mark.parametrize("count", [1, P - 1, P + 1])
def test_another_number_of_placeholders_is_refused(count):
    model = Decoder()
    attach(model, PTuningV1(length=P, placeholder_id=OUTSIDE), targets=["tok"])
    ids = torch.tensor([[OUTSIDE] * count + [1] * (6 - count), [OUTSIDE] * P + [1] * (6 - P)])
    with pytest.raises(
        PeftlibError, match=f"placeholder id {OUTSIDE} {count} times; the prompt has {P} rows"
    ):
        model(ids)


def test_without_the_prompt_an_unknown_id_is_the_models_own_error():
    model = Recurrent()
    tuning = attach(model, PTuningV1(length=P, placeholder_id=OUTSIDE))
    expected = copy.deepcopy(model)(IDX)
    with tuning.disabled():
        assert torch.equal(model(IDX), expected)  # no placeholder, no prompt
        with pytest.raises(IndexError):
            model(torch.tensor([[OUTSIDE]]))


def test_padding_is_no_placeholder():
    model = nn.Sequential(nn.Embedding(V, D, padding_idx=3), nn.LSTM(D, 2, batch_first=True))
    before, kinds = snapshot(model), classes(model)
    with pytest.raises(PeftlibError, match="placeholder_id=3 is the id of padding"):
        attach(model, PTuningV1(length=P, placeholder_id=3))
    assert_untouched(model, before, kinds)


@pytest.mark.parametrize("order", ["prompt first", "prompt last"])
def test_another_delta_at_the_embedding_neither_sees_nor_changes_placeholders(order):
    model = Decoder()
    reference = copy.deepcopy(model)
    methods = {"prompt": PTuningV1(length=P, placeholder_id=OUTSIDE, encoder="none"), "lora": LoRA(rank=2)}
    made = {}
    for name in methods if order == "prompt first" else reversed(methods):
        made[name] = attach(model, methods[name], targets=["tok"], name=name)
        randomize(made[name])
    attach(reference, methods["lora"], targets=["tok"], name="lora").load_state_dict(
        made["lora"].state_dict()
    )
    ids = torch.tensor([[OUTSIDE, 1, OUTSIDE, 2, OUTSIDE]])
    (rows,) = made["prompt"].parameters()
    torch.testing.assert_close(model.tok(ids)[0, ::2], rows)
    torch.testing.assert_close(model.tok(ids)[0, 1::2], reference.tok(torch.tensor([1, 2])))


def test_two_templates_on_one_embedding():
    model = Decoder()
    one = attach(
        model, PTuningV1(length=2, placeholder_id=OUTSIDE, encoder="none"), targets=["tok"], name="one"
    )
    two = attach(
        model, PTuningV1(length=1, placeholder_id=OUTSIDE + 1, encoder="none"), targets=["tok"], name="two"
    )
    randomize(one), randomize(two)
    out = model.tok(torch.tensor([OUTSIDE, OUTSIDE + 1, 4, OUTSIDE]))
    (a,), (b,) = one.parameters(), two.parameters()
    torch.testing.assert_close(out, torch.stack([a[0], b[0], model.tok.weight[4], a[1]]))


def test_templates_can_be_compiled_and_saved(tmp_path):
    model = Decoder()
    fresh = copy.deepcopy(model)
    tuning = attach(model, PTuningV1(length=P, placeholder_id=OUTSIDE), targets=["tok"])
    randomize(tuning, 0.5)
    ids = torch.tensor([[OUTSIDE, 1, OUTSIDE, OUTSIDE, 2], [1, 2, 3, 4, 5]])
    expected = model(ids)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids), expected)
    tuning.save(tmp_path / "template.safetensors")
    peftlib.load(fresh, tmp_path / "template.safetensors")
    assert torch.equal(fresh(ids), expected)
    with pytest.raises(PeftlibError, match="cannot be merged"):
        tuning.merge()


# -- what is wrong -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"length": 0}, "length must be an integer of at least 1"),
        ({"length": True}, "length must be an integer"),
        ({"length": 2, "encoder": "gru"}, "encoder must be 'lstm' or 'mlp'"),
        ({"length": 2, "hidden": 0}, "hidden must be an integer of at least 1"),
        ({"length": 2, "dropout": 1.0}, r"dropout must be a number in \[0, 1\)"),
        ({"length": 2, "placeholder_id": -1}, "must be a token id"),
        ({"length": 2, "placeholder_id": True}, "must be a token id"),
        (
            {"length": 2, "init": "uniform"},
            "PTuningV1.*init must be 'vocab', 'normal' or a list of token ids",
        ),
        ({"length": 2, "init": [1, 2, 3]}, "was given 3 token ids; give as many as the prompt is long"),
        ({"length": 2, "init": 7}, "must be a name or a list of token ids"),
    ],
)
def test_fields_out_of_range(fields, words):
    with pytest.raises(PeftlibError, match=words):
        PTuningV1(**fields)


def test_placeholders_are_for_embeddings():
    model = Decoder()
    before, kinds = snapshot(model), classes(model)
    with pytest.raises(TargetError, match=r"acts on an nn.Embedding; 'head' is Linear"):
        attach(model, PTuningV1(length=P, placeholder_id=OUTSIDE), targets=["head"])
    two: Any = nn.ModuleDict({"a": nn.Embedding(4, 2), "b": nn.Embedding(4, 2)})
    with pytest.raises(TargetError, match="2 embeddings: 'a', 'b'; name the one"):
        attach(two, PTuningV1(length=P, placeholder_id=9))
    assert_untouched(model, before, kinds)
