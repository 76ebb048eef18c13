"""What a target means: globs on any trailing part, types, predicates, exclusions, and errors that help."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import peftlib
from peftlib import Adapter, BitFit, FullFineTuning, LoRA, PeftlibError
from peftlib.selection import select
from peftlib.targets import Tree
from tests.twin import assert_untouched, classes, snapshot


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(4, 4), nn.Linear(4, 4)
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.q_proj(x) + self.v_proj(x))


class Model(nn.Module):
    def __init__(self, layers: int = 12) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(4, 9)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def names(targets: Any, model: nn.Module | None = None, method: Any = None) -> list[str]:
    tree = Tree(Model() if model is None else model)
    return [s.name for s in select(method or LoRA(rank=1), targets, tree, None)[0]]


ALL = [f"layers.{i}.{n}" for i in range(12) for n in ("q_proj", "v_proj", "mlp.0", "mlp.2")]


@pytest.mark.parametrize(
    "targets, expected",
    [
        ("q_proj", [f"layers.{i}.q_proj" for i in range(12)]),
        (["q_proj", "v_proj"], [n for n in ALL if n.endswith("proj")]),
        (
            ["v_proj", "q_proj", "q_proj"],
            [n for n in ALL if n.endswith("proj")],
        ),  # the model's order, once each
        ("*_proj", [n for n in ALL if n.endswith("proj")]),
        ("layers.3.*", [n for n in ALL if n.startswith("layers.3.")]),
        ("3.q_proj", ["layers.3.q_proj"]),
        ("layers.[01].q_proj", ["layers.0.q_proj", "layers.1.q_proj"]),
        ("layers.1?.q_proj", ["layers.10.q_proj", "layers.11.q_proj"]),
        ("layers.1.q_proj", ["layers.1.q_proj"]),  # not 11
        ("1.q_proj", ["layers.1.q_proj"]),
        ("mlp.*", [n for n in ALL if "mlp" in n]),  # what cannot carry it (the ReLU) is passed over
        ("*", [*ALL, "head", "embed"]),
        (nn.Linear, [*ALL, "head"]),
        ([nn.Embedding], ["embed"]),
        ([nn.Linear, "!layers.*"], ["head"]),
        (
            ["!mlp.0"],
            [n for n in [*ALL, "head"] if not n.endswith("mlp.0")],
        ),  # only subtracts from the default
        (["!layers.2", "!head"], [n for n in ALL if not n.startswith("layers.2.")]),
        (lambda n, m: n.endswith("head"), ["head"]),
        (
            [lambda n, m: isinstance(m, nn.Linear) and m.out_features == 8],
            [n for n in ALL if n.endswith("mlp.0")],
        ),
        (None, [*ALL, "head"]),
    ],
)
def test_targets_mean_these_sites(targets: Any, expected: list[str]) -> None:
    found = names(targets)
    assert sorted(found) == sorted(expected)
    order = list(Tree(Model()).modules)
    assert found == sorted(found, key=order.index)


def test_a_glob_on_a_whole_block_means_nothing_to_a_method_for_layers() -> None:
    with pytest.raises(PeftlibError, match=r"none of which can carry LoRA.*Inside it.*'layers\.0\.q_proj'"):
        names("layers.0")
    assert names("layers.0", method=Adapter(dim=2)) == ["layers.0"]


def test_a_glob_may_name_parameters_where_no_module_has_the_name() -> None:
    assert names("layers.0.q_proj.weight") == ["layers.0.q_proj.weight"]
    assert len(names("q_proj.weight")) == 12
    assert names("in_proj_weight", nn.MultiheadAttention(4, 2)) == ["in_proj_weight"]
    tree = Tree(Model())
    (site,) = select(LoRA(rank=1), ["layers.0.q_proj.weight"], tree, None)[0]
    assert (site.parameter, site.module) == ("weight", tree.model.layers[0].q_proj)


def test_a_module_goes_before_a_parameter_of_the_same_name() -> None:
    model = nn.Module()
    model.weight = nn.Linear(4, 4)
    model.part = nn.Linear(4, 4)
    assert names("weight", model) == ["weight"]


def test_a_module_itself_is_a_target() -> None:
    model = Model()
    assert names([model.layers[2].v_proj], model) == ["layers.2.v_proj"]
    with pytest.raises(PeftlibError, match="matches no module"):
        names([nn.Linear(4, 4)], model)


def test_the_root_is_the_empty_name() -> None:
    assert names("", nn.Linear(4, 4)) == [""]
    assert names(None, nn.Linear(4, 4)) == [""]
    assert names([""], Model(), Adapter(dim=2)) == [""]


# -- modules with several names ----------------------------------------------------------------------------------------


def test_a_module_used_twice_is_one_site_under_any_of_its_names() -> None:
    model = Model(3)
    model.layers[2] = model.layers[0]
    expected = ["layers.0.q_proj", "layers.1.q_proj"]
    assert names("q_proj", model) == expected
    assert names("layers.2.q_proj", model) == ["layers.0.q_proj"]
    assert names(["q_proj", "!layers.2"], model) == ["layers.1.q_proj"]
    tuning = peftlib.attach(model, LoRA(rank=2), targets=["layers.2.q_proj"])
    assert list(tuning.sites) == ["layers.0.q_proj"]


def test_a_module_that_holds_itself_ends() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.add_module("me", model)
    assert names(None, model) == ["0"]


def test_attentions_show_their_projections() -> None:
    model = nn.TransformerEncoderLayer(4, 2, 8)
    assert set(names("self_attn", model)) == {f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")}
    assert names("self_attn.k_proj", model) == ["self_attn.k_proj"]
    assert set(names(["self_attn", "!k_proj"], model)) == {f"self_attn.{p}_proj" for p in ("q", "v", "out")}
    assert set(names(None, model)) == {*names("self_attn", model), "linear1", "linear2"}


@given(st.data())
@settings(max_examples=50)
def test_any_trailing_part_of_a_name_finds_it(data: st.DataObject) -> None:
    model = Model(3)
    name = data.draw(st.sampled_from([n for n, m in model.named_modules() if isinstance(m, nn.Linear)]))
    parts = name.split(".")
    tail = ".".join(parts[data.draw(st.integers(0, len(parts) - 1)) :])
    found = names(tail, model)
    assert name in found
    assert all(f == tail or f.endswith(f".{tail}") for f in found)
    others = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in found]
    assert not any(n == tail or n.endswith(f".{tail}") for n in others)


# -- output heads ------------------------------------------------------------------------------------------------------


def test_output_heads() -> None:
    model = Model(2)
    assert Tree(model).output_heads(None) == set()  # nothing says so
    example = torch.tensor([[1, 2]])
    assert "head" not in peftlib.attach(model, LoRA(rank=1), example=example, name="seen").sites
    tied = Model(2)
    tied.head.weight = tied.embed.weight
    assert Tree(tied).output_heads(None) == {"head"}
    assert "head" not in peftlib.attach(tied, LoRA(rank=1)).sites

    class Declares(Model):
        def get_output_embeddings(self) -> nn.Module:
            return self.head

    declares = Declares(2)
    assert Tree(declares).output_heads(None) == {"head"}
    assert "head" in peftlib.attach(declares, LoRA(rank=1), targets=["head"]).sites  # named, it is taken


def test_a_model_whose_only_linear_is_its_head_needs_a_target() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(PeftlibError, match="finds no place in Sequential by default"):
        peftlib.attach(model, LoRA(rank=1), example=torch.zeros(1, 4))
    assert list(peftlib.attach(model, LoRA(rank=1), targets=["1"], example=torch.zeros(1, 4)).sites) == ["1"]


# -- what is executed --------------------------------------------------------------------------------------------------


class Skips(nn.Module):
    """Reads one layer's weight, never touches another, runs the third."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.idle, self.run, self.out = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.run(x) @ self.read.weight)


def test_an_explicit_target_that_never_runs_is_refused_and_a_default_leaves_it_out() -> None:
    x = torch.zeros(2, 4)
    for name in ("read", "idle"):
        model = Skips()
        before, kinds = snapshot(model), classes(model)
        with pytest.raises(PeftlibError, match=rf"never executes '{name}'.*'{name}\.weight' with LoRA"):
            peftlib.attach(model, LoRA(rank=2), targets=[name], example=x)
        assert_untouched(model, before, kinds)
    model = Skips()
    tuning = peftlib.attach(model, LoRA(rank=2), example=x)
    assert list(tuning.sites) == ["run"]
    idle = "not executed by the example"
    assert tuning.skipped == {"read": idle, "idle": idle, "out": "the output head"}
    assert "read (not executed by the example), idle (not executed" in str(peftlib.summary(model))
    named = peftlib.attach(model, LoRA(rank=2), targets=["read.weight"], example=x, name="raw")
    assert list(named.sites) == ["read.weight"]


def test_without_an_example_the_first_forward_tells() -> None:
    model = Skips()
    tuning = peftlib.attach(model, LoRA(rank=2))
    assert tuning.idle_sites() == ["read", "idle", "run", "out"]
    model(torch.zeros(2, 4))
    assert tuning.idle_sites() == ["read", "idle"]
    assert "has not run yet at read, idle" in str(peftlib.summary(model))


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "targets, message",
    [
        ("q_prj", r"'q_prj' matches nothing in Model.*Closest names:.*'q_proj'"),
        ("layer.3.q_proj", r"Closest names:.*'layers.3.q_proj'"),
        (["q_proj", "zzz"], r"'zzz' matches nothing.*Names in it end in: embed, layers, q_proj"),
        (["!q_prj"], r"The exclusion 'q_prj' matches nothing.*'q_proj'"),
        ([], r"targets=\[\] names no place"),
        (["!"], "excludes nothing"),
        (["q_proj", "!q_proj"], "wholly excluded"),
        (["!*"], "finds no place"),
        (nn.Conv2d, "target Conv2d matches no module"),
        (lambda n, m: False, "matches no module"),
        (5, "glob, a module type or a predicate"),
        (["q_proj", None], "glob, a module type or a predicate.*None"),
        ("embed.weight.x", "matches nothing"),
        ("mlp.1", r"none of which can carry LoRA.*\(ReLU\)"),
        ("q_proj.bias", r"parameter of Linear\)"),
    ],
)
def test_a_target_that_means_nothing_is_explained(targets: Any, message: str) -> None:
    model = Model()
    before, kinds = snapshot(model), classes(model)
    with pytest.raises(PeftlibError, match=message):
        peftlib.attach(model, LoRA(rank=2), targets=targets)
    assert_untouched(model, before, kinds)
    assert not peftlib.tunings(model)


def test_an_empty_module_is_explained() -> None:
    with pytest.raises(PeftlibError, match="matches nothing in Identity"):
        peftlib.attach(nn.Identity(), LoRA(rank=1), targets=["fc"])


# -- the tree ----------------------------------------------------------------------------------------------------------


def test_the_tree_is_the_model_before_any_tuning() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8), 2, enable_nested_tensor=False)
    before = Tree(model)
    parameters = [n for n, *_ in before.parameters()]
    peftlib.attach(model, LoRA(rank=1))
    peftlib.attach(model, Adapter(dim=2), name="adapter")
    peftlib.attach(model, BitFit(), name="bitfit")
    after = Tree(model)
    assert list(after.aliases) == list(before.aliases)
    assert [n for n, *_ in after.parameters()] == parameters == [n for n, _ in type(model)(
        nn.TransformerEncoderLayer(4, 2, 8), 2, enable_nested_tensor=False
    ).named_parameters()]  # fmt: skip


def test_what_lies_inside_a_module() -> None:
    tree = Tree(Model(12))
    for name in ("", "layers.1", "layers.1.mlp", "embed", "head"):
        prefix = f"{name}." if name else ""
        expected = [n for n in tree.modules if n == name or n.startswith(prefix)]
        assert [s.name for s in tree.inside(name)] == expected
        assert [s.module for s in tree.inside(name)] == [tree.modules[n] for n in expected]


def test_what_a_module_shares_with_an_earlier_one_lies_inside_both() -> None:
    model = nn.ModuleDict({"first": Block(), "second": Block()})
    model["second"].q_proj = model["first"].q_proj
    tree = Tree(model)
    inside = {"second", "first.q_proj", "second.v_proj", *(f"second.mlp{i}" for i in ("", ".0", ".1", ".2"))}
    assert {s.name for s in tree.inside("second")} == inside
    own = {id(p) for p in model["second"].parameters()}
    tuning = peftlib.attach(model, FullFineTuning(), targets=["second"])
    assert {id(p) for p in tuning.parameters()} == own
