"""The two tables: where methods can go, and what is trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftlib
from peftlib import Adapter, FullFineTuning, LoRA, PeftlibError, PTuningV2
from tests.twin import assert_untouched, classes, snapshot


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(4, 12), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 2)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.attn = Attention()
        self.norm = nn.LayerNorm(4)
        self.experts = nn.Parameter(torch.randn(2, 4, 4))
        self.idle = nn.Linear(4, 4)
        self.head = nn.Linear(4, 9)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(self.norm(x + self.attn(x)) @ self.experts[0])


IDS = torch.tensor([[1, 2, 3]])


def rows(model: nn.Module, example: Any = None) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in peftlib.inspect(model, example).rows}


def test_inspect_lists_every_place_and_what_it_can_carry() -> None:
    model = Net()
    before, kinds = snapshot(model), classes(model)
    found = rows(model, IDS)
    assert set(found) == {"(root)", *(n for n, _ in model.named_modules() if n), "experts"}
    assert {n: r["methods"] for n, r in found.items()} == {
        "(root)": "Adapter",
        "embed": "LoRA, Adapter, PromptTuning, PTuningV1, TokenRows",
        "attn": "Adapter, PrefixTuning, PTuningV2",
        "attn.qkv": "LoRA, Adapter",
        "attn.o": "LoRA, Adapter",
        "norm": "Adapter",
        "experts": "LoRA",
        "idle": "LoRA, Adapter",
        "head": "LoRA, Adapter, head",
    }
    assert found["attn.qkv"] == {
        "name": "attn.qkv",
        "type": "Linear",
        "parameters": 60,
        "calls": 1,
        "input": "(1, 3, 4)",
        "output": "(1, 3, 12)",
        "methods": "LoRA, Adapter",
    }
    assert (found["idle"]["calls"], found["idle"]["input"]) == (0, "-")
    assert sum(r["parameters"] for n, r in found.items() if n != "experts") == sum(
        p.numel() for p in model.parameters()
    )
    text = str(peftlib.inspect(model, IDS))
    assert "never executed by the example: idle" in text
    assert text.splitlines()[0].startswith("Net: where methods can go")
    assert_untouched(model, before, kinds)


def test_inspect_without_an_example_shows_what_attributes_tell() -> None:
    found = rows(Net())
    assert "calls" not in found["attn"]
    assert found["attn"]["methods"] == "Adapter"
    assert found["head"]["methods"] == "LoRA, Adapter"


def test_what_inspect_offers_can_be_attached() -> None:
    example = {"LoRA": LoRA(rank=1), "Adapter": Adapter(dim=1), "PTuningV2": PTuningV2(length=1)}
    for name, row in rows(Net(), IDS).items():
        for offered in row["methods"].split(", "):
            if offered in example and name != "idle":
                target = "" if name == "(root)" else name
                tuning = peftlib.attach(Net(), example[offered], targets=[target], example=IDS)
                assert tuning.num_parameters > 0


def test_inspect_shows_the_model_under_its_tunings() -> None:
    model = Net()
    plain = peftlib.inspect(model, IDS).rows
    peftlib.attach(model, LoRA(rank=2), example=IDS)
    peftlib.attach(model, PTuningV2(length=2), example=IDS, name="prompts")
    assert peftlib.inspect(model, IDS).rows == plain


def test_inspect_names_attention_that_cannot_be_reached() -> None:
    class Foreign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha = nn.MultiheadAttention(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            m = self.mha
            return F.multi_head_attention_forward(
                x, x, x, 4, 2, m.in_proj_weight, m.in_proj_bias, None, None, False, 0.0, m.out_proj.weight,
                m.out_proj.bias,
            )[0]  # fmt: skip

    table = peftlib.inspect(nn.Sequential(Foreign()), torch.zeros(3, 1, 4))
    assert "attention that no prefix can reach: 0" in str(table)


# -- summary -----------------------------------------------------------------------------------------------------------


def test_summary_counts_parameters_bytes_and_states() -> None:
    model = Net()
    total = sum(p.numel() for p in model.parameters())
    table = peftlib.summary(model)
    assert [r["name"] for r in table.rows] == ["base"]
    assert (table.rows[0]["trained"], table.rows[0]["state"]) == (total, "trained")
    lora = peftlib.attach(model, LoRA(rank=2), targets=["attn.o"], name="lora")
    peftlib.attach(
        model, {"norm": Adapter(dim=1, dtype=torch.float64), "head": LoRA(rank=1)}, name="mixed"
    ).disable()
    base, one, two = peftlib.summary(model).rows
    assert base == {
        "name": "base", "method": "Net", "trained": 0, "share": 0.0, "bytes": 4 * total, "sites": 0, "state": "frozen",
    }  # fmt: skip
    assert one == {
        "name": "lora", "method": "LoRA", "trained": 16, "share": 16 / total, "bytes": 64, "sites": 1,
        "state": "enabled",
    }  # fmt: skip
    assert (two["method"], two["trained"], two["bytes"], two["state"]) == (
        "Adapter, LoRA", 13 + 13, 8 * 13 + 4 * 13, "disabled",
    )  # fmt: skip
    lora.merge()
    assert peftlib.summary(model).rows[1]["state"] == "merged"
    assert peftlib.summary(model).to_dict()["rows"][0]["trained"] == 0


def test_summary_counts_a_shared_weight_once_and_a_trained_base_weight_as_the_tunings() -> None:
    model = Net()
    model.head.weight = model.embed.weight
    total = sum(p.numel() for p in model.parameters())
    peftlib.attach(model, FullFineTuning(), targets=["head"], name="full")
    table = peftlib.summary(model)
    assert table.rows[0]["bytes"] == 4 * total
    assert (table.rows[0]["trained"], table.rows[1]["trained"]) == (0, 36 + 9)
    assert table.footer["trained"] == 36 + 9
    assert table.footer["bytes"] == 4 * 45


def test_summary_of_what_still_trains_beside_a_tuning() -> None:
    model = Net()
    peftlib.attach(model, LoRA(rank=1), targets=["head"], freeze=False)
    table = peftlib.summary(model)
    total = sum(p.numel() for n, p in model.named_parameters() if "_peft" not in n)
    assert (table.rows[0]["trained"], table.rows[0]["state"]) == (total, "trained")
    assert table.footer["trained"] == total + 13


def test_summary_on_meta_costs_nothing() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(100_000, 100_000, bias=False) for _ in range(3)))
    peftlib.attach(model, LoRA(rank=8))
    base, tuning = peftlib.summary(model).rows
    assert base["bytes"] == 3 * 4 * 10**10
    assert tuning["trained"] == 3 * 8 * 200_000


def test_summary_of_a_model_without_parameters() -> None:
    assert peftlib.summary(nn.ReLU()).rows[0]["share"] == 0.0


@pytest.mark.parametrize("table", [peftlib.inspect, peftlib.summary])
def test_only_modules_are_shown(table: Any) -> None:
    with pytest.raises(PeftlibError, match=r"needs an nn\.Module; got str"):
        table("model")
