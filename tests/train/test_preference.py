"""DPO, KTO and the reward model's loss: hand-computed values, gradients, and what they refuse."""

from __future__ import annotations

import math
import re

import pytest
import torch

import peftlib
from peftlib import LoRA, NewHead, PeftlibError
from peftlib.train import (
    Encoded,
    Judged,
    Pair,
    Preference,
    RewardModel,
    byte_tokenizer,
    dpo,
    dpo_loss,
    encode_pair,
    fit,
    init_head,
    kto,
    kto_loss,
    pad_judged,
    pad_pairs,
    reward_accuracy,
    reward_loss,
    reward_model,
    score,
    sequence_logps,
)
from tests.train.rl import Chain


def t(*numbers):
    return torch.tensor(numbers, dtype=torch.float64, requires_grad=True)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


H = (-3.0 + 4.0) - (-5.0 + 2.0)  # of the pair below: 4


@pytest.mark.parametrize(
    "settings, value",
    [
        ({"beta": 0.5}, -math.log(sigmoid(0.5 * H))),
        (
            {"beta": 0.5, "label_smoothing": 0.2},
            -0.8 * math.log(sigmoid(0.5 * H)) - 0.2 * math.log(sigmoid(-0.5 * H)),
        ),
        ({"beta": 0.1, "kind": "ipo"}, (H - 5) ** 2),
        ({"beta": 0.1, "kind": "hinge"}, 1 - 0.1 * H),
        ({"beta": 0.5, "kind": "hinge"}, 0.0),
    ],
)
def test_dpo_by_hand(settings, value):
    assert dpo_loss(t(-3.0), t(-5.0), t(-4.0), t(-2.0), **settings).item() == pytest.approx(value)


def test_dpo_gradients():
    args = [t(*torch.randn(3, dtype=torch.float64).tolist()) for _ in range(4)]
    for settings in ({}, {"label_smoothing": 0.1}, {"kind": "ipo"}, {"kind": "hinge", "beta": 0.05}):
        assert torch.autograd.gradcheck(lambda *a, s=settings: dpo_loss(*a, **s), args)


def test_kto_by_hand():
    here, there = t(-1.0, -2.0), t(-2.0, -1.0)
    value = (1.5 * (1 - sigmoid(0.3 * (1 - 0.5))) + 0.5 * (1 - sigmoid(0.3 * (0.5 + 1)))) / 2
    desirable = torch.tensor([True, False])
    assert kto_loss(here, there, desirable, 0.5, 0.3, 1.5, 0.5).item() == pytest.approx(value)
    # many log-ratios are averaged, and no less than nothing is lost
    assert kto_loss(here, there, desirable, torch.tensor([0.0, 1.0]), 0.3, 1.5, 0.5).item() == pytest.approx(
        value
    )
    zero = kto_loss(here, there, desirable, -3.0, 0.3)
    assert zero.item() == pytest.approx(kto_loss(here, there, desirable, 0.0, 0.3).item())
    assert torch.autograd.gradcheck(lambda a, b: kto_loss(a, b, desirable, 0.5), [here, there])


def test_reward_loss_by_hand():
    better, worse = t(2.0, 0.5), t(1.0, 1.0)
    value = (-math.log(sigmoid(1.0 - 0.25)) - math.log(sigmoid(-0.5 - 0.25))) / 2
    centred = value + 0.01 * (9 + 2.25) / 2
    assert reward_loss(better, worse, margin=0.25).item() == pytest.approx(value)
    assert reward_loss(better, worse, torch.tensor([0.25, 0.25]), 0.01).item() == pytest.approx(centred)
    assert torch.autograd.gradcheck(lambda a, b: reward_loss(a, b, 0.25, 0.01), [better, worse])


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: dpo_loss(t(1.0), t(1.0, 2.0), t(1.0), t(1.0)), r"one shape.*\(1,\), \(2,\)"),
        (lambda: dpo_loss(*[torch.zeros(2, 3)] * 4), "Sum log-probabilities"),
        (lambda: dpo_loss(*[torch.zeros(0)] * 4), "at least one row"),
        (lambda: dpo_loss(*[t(1.0)] * 4, beta=0.0), "beta=0.0"),
        (lambda: dpo_loss(*[t(1.0)] * 4, kind="best"), "'best' is unknown"),
        (lambda: dpo_loss(*[t(1.0)] * 4, label_smoothing=0.5), "below 0.5"),
        (lambda: dpo_loss(*[t(1.0)] * 4, label_smoothing=0.1, kind="ipo"), "goes with kind='sigmoid'"),
        (lambda: kto_loss(t(1.0), t(1.0), torch.tensor([1]), 0.0), "booleans; got torch.int64"),
        (lambda: kto_loss(t(1.0), t(1.0), torch.tensor([True, False]), 0.0), "one shape"),
        (lambda: reward_loss(t(1.0), t(1.0), torch.zeros(3)), "one shape"),
        (lambda: reward_loss(t(1.0), t(1.0), centering=-1.0), "centering=-1.0"),
    ],
)
def test_what_losses_refuse(call, says):
    with pytest.raises(PeftlibError, match=says):
        call()


def pairs(rows=4):
    """After a prompt, 1 is better than 2."""
    return [
        Pair(
            Encoded([0, 3, 1][-2 - i % 2 :], [-100, -100, 1][-2 - i % 2 :]), Encoded([3, 2, 2], [-100, 2, 2])
        )
        for i in range(rows)
    ]


def test_sequence_logps_are_sums_over_the_completion():
    model = Chain().double()
    batch = pad_pairs(pairs(2), pad_id=0)
    logps = model(batch["inputs"]).log_softmax(-1)
    naive = [
        sum(logps[row, i - 1, id_] for i, id_ in enumerate(labels) if id_ != -100)
        for row, labels in enumerate(batch["labels"].tolist())
    ]
    torch.testing.assert_close(sequence_logps(model, batch), torch.stack(naive))
    counts = (batch["labels"][:, 1:] != -100).sum(1)
    torch.testing.assert_close(sequence_logps(model, batch, mean=True), torch.stack(naive) / counts)
    torch.testing.assert_close(sequence_logps(model, batch, head="1"), torch.stack(naive))


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "hinge"])
def test_dpo_starts_where_the_reference_is_and_learns_the_preference(kind):
    model = Chain()
    base = {k: v.clone() for k, v in model.state_dict().items()}
    tuning = peftlib.attach(model, LoRA(rank=4), targets=["1"], name="policy")
    batch = pad_pairs(pairs(), pad_id=0)
    begin = {"sigmoid": math.log(2), "ipo": 25.0, "hinge": 1.0}[kind]

    def loss(model, batch):
        return dpo(model, batch, beta=0.1 if kind == "ipo" else 0.5, kind=kind)

    total, count = loss(model, batch)
    if kind == "ipo":
        begin = (1 / 0.2) ** 2
    assert total.item() / count == pytest.approx(begin, rel=1e-6)
    assert count == 4
    before = reward_gap(model, batch)
    history = fit(model, [batch], loss, optimizer=torch.optim.Adam(tuning.parameters(), lr=0.05), steps=30)
    assert history.last("loss") < 0.8 * begin
    assert reward_gap(model, batch) > before + 1
    assert all(torch.equal(model.state_dict()[k], v) for k, v in base.items())  # the reference, bit for bit


def reward_gap(model, batch):
    with torch.no_grad():
        chosen, rejected = sequence_logps(model, batch).chunk(2)
    return (chosen - rejected).mean().item()


def test_a_tuning_goes_on_from_another_which_stays_its_reference(tmp_path):
    model = Chain()
    sft = peftlib.attach(model, LoRA(rank=4), targets=["1"], name="sft")
    torch.nn.init.normal_(sft.state_dict()["1.lora.b"])
    sft.save(tmp_path / "sft.safetensors")
    policy = peftlib.load(model, tmp_path / "sft.safetensors", name="policy")
    peftlib.use(model, "policy")
    batch = pad_pairs(pairs(), pad_id=0)
    total, count = dpo(model, batch, reference=("sft",))
    assert total.item() / count == pytest.approx(math.log(2), rel=1e-6)
    known = {**batch, "reference_logps": torch.cat([torch.full((4,), -1.0), torch.full((4,), -2.0)])}
    assert dpo(model, known)[0].item() != pytest.approx(total.item())
    assert policy.enabled
    assert not sft.enabled


@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "hinge"])
def test_known_log_probabilities_are_sums_whatever_the_kind(kind):
    model = Chain()
    batch = pad_pairs(pairs(), pad_id=0)
    known = {**batch, "reference_logps": sequence_logps(model, batch).detach()}
    nn_b = peftlib.attach(model, LoRA(rank=4), targets=["1"]).state_dict()["1.lora.b"]
    torch.nn.init.normal_(nn_b)
    torch.testing.assert_close(dpo(model, known, kind=kind)[0], dpo(model, batch, kind=kind)[0])


@pytest.mark.parametrize("reference", [(), "module"])
def test_a_policy_is_not_its_own_reference(reference):
    model = Chain()
    batch = pad_pairs(pairs(), pad_id=0)
    with pytest.raises(PeftlibError, match="the same: Chain with the tunings \\(none\\)"):
        dpo(model, batch, reference=model if reference == "module" else ())
    # another module may be one
    assert dpo(model, batch, reference=Chain())[0].item() == pytest.approx(4 * math.log(2), rel=1e-6)


def test_kto_starts_at_a_half_and_learns():
    model = Chain()
    tuning = peftlib.attach(model, LoRA(rank=4), targets=["1"])
    judged = [Judged(pair.chosen, True) for pair in pairs()] + [
        Judged(pair.rejected, False) for pair in pairs()
    ]
    batch = pad_judged(judged, pad_id=0)
    assert batch["mismatched"]["inputs"].shape[0] == 8
    total, count = kto(model, batch)
    assert total.item() / count == pytest.approx(0.5, rel=1e-6)
    before = reward_gap(model, pad_pairs(pairs(), pad_id=0))
    fit(model, [batch], kto, optimizer=torch.optim.Adam(tuning.parameters(), lr=0.05), steps=20)
    assert reward_gap(model, pad_pairs(pairs(), pad_id=0)) > before + 1


@pytest.mark.parametrize("checkpoints", [False, "1"])
@pytest.mark.parametrize("loss", [dpo, kto])
def test_dropout_is_off_in_the_policy_too(loss, checkpoints):
    judged = [Judged(e, good) for p in pairs() for e, good in ((p.chosen, True), (p.rejected, False))]
    batch = pad_pairs(pairs(), pad_id=0) if loss is dpo else pad_judged(judged, pad_id=0)
    ends, seen = [], []

    def watched(model, batch):
        seen.append(model[1].training)
        return loss(model, batch)

    for dropout in (0.0, 0.9):
        model = Chain()
        torch.manual_seed(1)
        tuning = peftlib.attach(model, LoRA(rank=4, dropout=dropout), targets=["1"])
        adam = torch.optim.Adam(tuning.parameters(), lr=0.05)
        fit(model, [batch], watched, optimizer=adam, steps=3, checkpoint_activations=checkpoints)
        ends.append(tuning.state_dict())
    assert all(seen)  # fit's own mode is as ever
    assert ends[0]["1.lora.b"].any()
    assert all(torch.equal(ends[1][k], v) for k, v in ends[0].items())


def test_mismatched_completions_stand_after_others_prompts():
    batch = pad_judged(
        [Judged(Encoded([1, 2], [-100, 2]), True), Judged(Encoded([3, 4, 5], [-100, 4, 5]), False)], 0
    )
    assert batch["mismatched"]["inputs"].tolist() == [[1, 4, 5], [3, 2, 0]]
    assert batch["mismatched"]["labels"].tolist() == [[-100, 4, 5], [-100, 2, -100]]
    assert batch["desirable"].tolist() == [True, False]


def test_mismatched_completions_are_of_another_prompt_and_fit_where_the_rows_do():
    def judged(*rows):
        return [Judged(Encoded(p + c, [-100] * len(p) + c), i % 2 == 0) for i, (p, c) in enumerate(rows)]

    # rows of one prompt next to one another, as pairs that were taken apart are
    batch = pad_judged(judged(([1], [2]), ([1], [3]), ([4], [5]), ([4], [6])), 0)
    assert batch["mismatched"]["inputs"].tolist() == [[1, 5], [1, 5], [4, 2], [4, 2]]
    # a long prompt with a long completion loses its beginning
    batch = pad_judged(judged(([1, 2, 3], [4]), ([5], [6, 7, 8])), 0)
    assert batch["inputs"].shape == batch["mismatched"]["inputs"].shape == (2, 4)
    assert batch["mismatched"]["inputs"].tolist() == [[3, 6, 7, 8], [5, 4, 0, 0]]
    for rows in ([([1], [2])], [([1], [2]), ([1], [3])]):
        with pytest.raises(PeftlibError, match=f"all {len(rows)} row.* have one prompt. Give larger batches"):
            pad_judged(judged(*rows), 0)
    with pytest.raises(PeftlibError, match="Row 1 has no completion"):
        pad_judged([*judged(([1], [2])), Judged(Encoded([1, 2], [-100, -100]), True)], 0)


def test_pairs_from_text():
    pair = encode_pair(Preference("a", "b", "cd"), byte_tokenizer())
    assert pair.rejected == Encoded([97, 99, 100, 257], [-100, 99, 100, 257])
    with pytest.raises(PeftlibError, match="line 3: a completion is empty"):
        encode_pair(Preference("a", "b", "", source="line 3"), byte_tokenizer())
    with pytest.raises(PeftlibError, match="several trained pieces"):
        pad_judged([Judged(Encoded([1, 2, 3], [1, -100, 3]), True)], 0)
    with pytest.raises(PeftlibError, match="Row 1 has no completion"):
        sequence_logps(
            Chain(),
            {"inputs": torch.ones(2, 2, dtype=torch.long), "labels": torch.tensor([[1, 1], [1, -100]])},
        )
    with pytest.raises(PeftlibError, match="chosen rows and then as many"):
        dpo(Chain(), {"inputs": torch.ones(1, 2), "labels": torch.ones(1, 2)})


# -- the reward model --------------------------------------------------------------------------------------------------


def test_a_reward_model_is_a_tuning_with_a_head_on_the_base():
    model = Chain()
    base = model(torch.tensor([[1, 2]]))
    reward = peftlib.attach(model, {"0": LoRA(rank=2), "1": NewHead(1)}, name="reward")
    init_head(reward)
    batch = pad_pairs(pairs(), pad_id=0)
    optimizer = torch.optim.Adam(reward.parameters(), lr=0.05)
    history = fit(
        model,
        [batch],
        reward_model,
        optimizer=optimizer,
        steps=40,
        evaluate=lambda m: reward_accuracy(m, [batch]),
    )
    assert history.last("eval_accuracy") == 1.0
    assert history.last("eval_margin") > 1
    reward.disable()
    assert torch.equal(model(torch.tensor([[1, 2]])), base)
    judge = RewardModel(reward, rows=3)
    prompts, completions = [[3], [0, 3], [3], [3]], [[1], [1], [2, 2], [2]]
    scores = judge(prompts, completions)
    assert scores[0] > scores[2]
    with peftlib.use(model, "reward"):
        alone = [
            score(model, {"inputs": torch.tensor([p + c]), "attention_mask": torch.ones(1, len(p + c))})
            for p, c in zip(prompts, completions, strict=True)
        ]
    torch.testing.assert_close(scores, torch.cat(alone))  # padding changes nothing
    assert abs(judge.centre(prompts, completions)(prompts, completions).mean().item()) < 1e-6


def test_a_reward_model_judges_as_it_was_trained():
    model = torch.nn.Sequential(torch.nn.Embedding(4, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
    sft = peftlib.attach(model, {"1": LoRA(rank=4)}, name="sft")
    torch.nn.init.normal_(sft.state_dict()["1.lora.b"])
    reward = init_head(peftlib.attach(model, {"2": NewHead(1)}, name="reward"))
    batch = pad_pairs(pairs(), pad_id=0)
    with pytest.raises(PeftlibError, match=r"Enabled are \['sft', 'reward'\].*under=\('sft',\)"):
        reward_model(model, batch)
    assert reward_model(model, batch, under=("sft",))[1] == 4
    trained = score(model, {"inputs": torch.tensor([[1, 2, 3]]), "attention_mask": torch.ones(1, 3)})
    torch.testing.assert_close(RewardModel(reward, under=("sft",))([[1]], [[2, 3]]), trained)
    assert not torch.allclose(RewardModel(reward)([[1]], [[2, 3]]), trained)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_centred_scores_have_a_mean_of_zero_in_any_dtype(dtype):
    model = Chain().to(dtype)
    reward = init_head(peftlib.attach(model, {"1": NewHead(1)}, name="reward"))
    with torch.no_grad():
        reward.state_dict()["1.newhead.bias"].fill_(37.3)
    prompts, completions = [[0], [1], [2], [3]] * 4, [[1], [2], [3], [0]] * 4
    scores = RewardModel(reward).centre(prompts, completions)(prompts, completions)
    assert abs(scores.mean().item()) < 1e-4


def test_the_head_begins_small():
    model = torch.nn.Sequential(torch.nn.Embedding(4, 1023), torch.nn.Linear(1023, 4))
    tuning = init_head(peftlib.attach(model, {"1": NewHead(1)}))
    weight = tuning.state_dict()["1.newhead.weight"]
    assert weight.std().item() == pytest.approx(1 / 32, rel=0.1)
    assert tuning.state_dict()["1.newhead.bias"].item() == 0


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda m: init_head(peftlib.attach(m, LoRA(rank=1), targets=["1"])), "has no new head"),
        (lambda m: init_head(peftlib.attach(m, {"1": NewHead(2)})), "has 2 outputs"),
        (
            lambda m: score(m, {"inputs": torch.ones(1, 2).long(), "attention_mask": torch.ones(1, 2)}),
            "(1, 2, 4).*NewHead(1)",
        ),
        (lambda m: reward_accuracy(m, []), "no batches"),
        (lambda m: RewardModel(peftlib.attach(m, {"1": NewHead(1)}), rows=0), "rows=0"),
        (lambda m: RewardModel(peftlib.attach(m, {"1": NewHead(1)}))([], []), "got 0 and 0"),
        (lambda m: RewardModel(peftlib.attach(m, {"1": NewHead(1)}))([[1]], [[1], [2]]), "got 1 and 2"),
        (
            lambda m: RewardModel(peftlib.attach(m, {"1": NewHead(1)}))([[1], []], [[], []]),
            "completion 1 have no",
        ),
        (
            lambda m: RewardModel(peftlib.attach(m, {"1": NewHead(1)}))([[1]], [[99]]),
            "the largest of them 99",
        ),
        (
            lambda m: RewardModel(peftlib.attach(m, {"1": NewHead(1, bias=False)})).centre([[1]], [[2]]),
            "no bias to shift",
        ),
    ],
)
def test_what_a_reward_model_refuses(call, says):
    with pytest.raises(PeftlibError, match=re.escape(says).replace(r"\.\*", ".*")):
        call(Chain())


def test_a_row_without_a_token_has_no_score():
    model = Chain()
    peftlib.attach(model, {"1": NewHead(1)})
    with pytest.raises(PeftlibError, match="Row 1 has no token"):
        score(model, {"inputs": torch.ones(2, 2).long(), "attention_mask": torch.tensor([[1, 0], [0, 0]])})
