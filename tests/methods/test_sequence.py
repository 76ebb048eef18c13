"""Calls made longer and outputs made shorter again, argument by argument.

Shapes: B batch, P prompt, T tokens, L = P + T, D width, H heads, V vocabulary.
"""

from __future__ import annotations

import collections
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from peftlib.errors import PeftlibError, TargetError
from peftlib.methods.arguments import KINDS, Layout
from peftlib.methods.calls import argument_names, back, by_name, is_filled
from peftlib.methods.masks import lengthen_mask
from peftlib.methods.outputs import learn_outputs, shorten
from peftlib.methods.sequence import lengthen

sizes = st.integers(1, 5)
BOOL, INT, FLOAT = torch.bool, torch.long, torch.float64


# -- masks -------------------------------------------------------------------------------------------------------------


def by_hand(real: Tensor, extra: int, both_ways: bool) -> Tensor:
    """Who sees whom with P virtual tokens in front, (..., L, L), from the real tokens' (..., T, T), by loops."""
    T = real.shape[-1]
    found = torch.zeros(*real.shape[:-2], extra + T, extra + T, dtype=BOOL)
    for i in range(extra + T):
        for j in range(extra + T):
            if i >= extra and j >= extra:
                found[..., i, j] = real[..., i - extra, j - extra]
            elif j < extra:
                found[..., i, j] = both_ways or j <= i
            else:
                # A real token that every real row sees, rows that see nothing aside.
                rows = [real[..., k, :] for k in range(T)]
                seen = [~row.any(-1) | row[..., j - extra] for row in rows]
                somebody = torch.stack([row[..., j - extra] for row in rows]).any(0)
                found[..., i, j] = torch.stack(seen).all(0) & somebody if both_ways else torch.zeros(())
    return found


def encoded(visible: Tensor, dtype: torch.dtype, hides: bool = False, hidden: float = -torch.inf) -> Tensor:
    if dtype.is_floating_point:
        return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, hidden)
    return (visible ^ hides).to(dtype)


def decoded(mask: Tensor, hides: bool = False) -> Tensor:
    return mask > -1e4 if mask.is_floating_point() else mask.bool() ^ hides


def causal(T: int, keep: Tensor | None = None) -> Tensor:
    real = torch.ones(T, T, dtype=BOOL).tril()
    return real if keep is None else real & keep[:, None, None, :]


KEEP = {
    "whole": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1]], dtype=BOOL),
    "right": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]], dtype=BOOL),
    "left": torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]], dtype=BOOL),
    "one token": torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0]], dtype=BOOL),
    "an empty sequence": torch.tensor([[0, 0, 0, 0], [1, 1, 1, 0]], dtype=BOOL),
}


@pytest.mark.parametrize("dtype", [BOOL, INT, FLOAT, torch.float16])
@pytest.mark.parametrize("padding", KEEP)
@pytest.mark.parametrize("both_ways", [False, True])
def test_square_masks_are_those_of_virtual_tokens(dtype, padding, both_ways):
    keep = KEEP[padding]
    real = keep[:, None, None, :].expand(2, 1, 4, 4) if both_ways else causal(4, keep)
    longer = lengthen_mask(encoded(real, dtype), 3, square=True)
    assert longer.dtype == dtype
    assert torch.equal(decoded(longer), by_hand(real, 3, both_ways))


@pytest.mark.parametrize("hidden", [-torch.inf, torch.finfo(FLOAT).min, -1e9, -1e4])
def test_whatever_an_additive_mask_hides_with(hidden):
    for real, both_ways in ((causal(4), False), (torch.ones(4, 4, dtype=BOOL), True)):
        longer = lengthen_mask(encoded(real, FLOAT, hidden=hidden), 2, square=True)
        assert torch.equal(decoded(longer), by_hand(real, 2, both_ways))


@pytest.mark.parametrize("dtype", [BOOL, INT])
def test_masks_that_mark_what_is_hidden(dtype):
    for real, both_ways in ((causal(4), False), (torch.ones(4, 4, dtype=BOOL), True)):
        longer = lengthen_mask(encoded(real, dtype, hides=True), 2, square=True, hides=True)
        assert torch.equal(decoded(longer, hides=True), by_hand(real, 2, both_ways))


def test_no_later_token_leaks_into_the_prompt_of_a_prefix_model():
    # Two tokens of prefix that see each other, then causal: the prompt belongs to the prefix.
    real = causal(5) | (torch.arange(5) < 2)
    longer = lengthen_mask(real, 3, square=True)
    assert torch.equal(longer, by_hand(real, 3, True))
    assert longer[:3, 3:5].all()
    assert not longer[:3, 5:].any()


def test_padding_rows_that_see_everything_do_not_make_a_mask_bidirectional():
    real = causal(4, KEEP["left"]).clone()
    real[0, 0, :2] = True
    longer = lengthen_mask(real, 2, square=True)
    assert not longer[..., :2, 2:].any()


def test_a_bias_keeps_its_values():
    bias = torch.randn(2, 4, 4)
    longer = lengthen_mask(bias, 3, square=True)
    assert torch.equal(longer[..., 3:, 3:], bias)
    assert not longer[..., :3].any()


@pytest.mark.parametrize(
    "mask, hides, seen",
    [
        (torch.tensor([[True, False]]), False, True),
        (torch.tensor([[True, False]]), True, False),
        (torch.tensor([[1, 0]]), False, 1),
        (torch.tensor([[1, 0]]), True, 0),
        (torch.tensor([[1.0, 0.0]]), False, 1.0),
        (torch.tensor([[0.0, -torch.inf]]), True, 0.0),
        (torch.tensor([[[[0.0, -torch.inf]]]]), False, 0.0),
    ],
)
def test_masks_of_columns(mask, hides, seen):
    longer = lengthen_mask(mask, 2, hides=hides)
    assert longer.dtype == mask.dtype
    assert torch.equal(longer, torch.cat([torch.full_like(mask, seen), mask], -1))


def test_masks_of_an_inner_axis():
    mask = torch.tensor([[[1.0], [0.0]], [[1.0], [1.0]]])
    longer = lengthen_mask(mask, 2, axis=1)
    assert torch.equal(longer, torch.cat([torch.ones(2, 2, 1), mask], 1))


@given(
    B=sizes,
    T=st.integers(2, 5),
    P=sizes,
    bits=st.integers(0),
    both_ways=st.booleans(),
    floating=st.booleans(),
)
def test_any_padding_is_that_of_virtual_tokens(B, T, P, bits, both_ways, floating):
    keep = torch.tensor([[bool(bits >> (b * T + t) & 1) for t in range(T)] for b in range(B)])
    keep[0, :2] = True  # of fewer than two tokens nobody can tell
    real = keep[:, None, None, :].expand(B, 1, T, T) if both_ways else causal(T, keep)
    longer = lengthen_mask(encoded(real, FLOAT if floating else BOOL), P, square=True)
    assert torch.equal(decoded(longer), by_hand(real, P, both_ways))


# -- arguments ---------------------------------------------------------------------------------------------------------

B, T, P = 2, 5, 3
IDS = torch.arange(B * T).view(B, T)


def longer_by(layout: Layout, **call: Any) -> dict[str, Any]:
    return lengthen(layout, {"ids": IDS, **call}, P, placeholder=7).changed


def front(value: Tensor, fill: Any, axis: int) -> Tensor:
    size = list(value.shape)
    size[axis] = P
    return torch.cat([torch.full(size, fill, dtype=value.dtype), value], axis)


ids_layout = Layout("ids", "ids")
PAD = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])

ALIGNED = {
    "attention_mask": (PAD, front(PAD, 1, 1)),
    "mask": (PAD.bool(), front(PAD.bool(), True, 1)),
    "src_mask": (PAD.double(), front(PAD.double(), 1, 1)),
    "pad_mask": (PAD == 0, front(PAD == 0, False, 1)),
    "src_key_padding_mask": (PAD == 0, front(PAD == 0, False, 1)),
    "is_padding": (PAD == 0, front(PAD == 0, False, 1)),
    "loss_mask": (PAD, front(PAD, 0, 1)),
    "target_mask": (PAD.bool(), front(PAD.bool(), False, 1)),
    "token_type_ids": (PAD, front(PAD, 0, 1)),
    "segment_ids": (PAD[:1], front(PAD[:1], 0, 1)),
    "labels": (IDS, front(IDS, -100, 1)),
    "targets": (IDS, front(IDS, -100, 1)),
    "position_ids": (torch.arange(T).expand(B, T), torch.arange(P + T).expand(B, P + T)),
    "positions": (torch.arange(T)[None], torch.arange(P + T)[None]),
    "input_pos": (torch.arange(T), torch.arange(P + T)),
    "cache_position": (torch.arange(T), torch.arange(P + T)),
    "multimodal_positions": (
        torch.arange(T).expand(3, B, T).contiguous(),
        torch.arange(P + T).expand(3, B, P + T),
    ),
    "node_mask": (PAD[..., None].double(), front(PAD[..., None].double(), 1, 1)),
}


@pytest.mark.parametrize("name", ALIGNED)
def test_an_argument_told_by_name_and_shape(name):
    value, expected = ALIGNED[name]
    changed = longer_by(ids_layout, **{name: value})
    assert torch.equal(changed["ids"], front(IDS, 7, 1))
    assert changed[name].dtype == value.dtype
    assert torch.equal(changed[name], expected)


@pytest.mark.parametrize("name", ["lengths", "seq_lens", "src_len"])
@pytest.mark.parametrize("value", [torch.tensor([5, 2]), [5, 2], (5, 2)], ids=["tensor", "list", "tuple"])
def test_lengths_count_the_prompt(name, value):
    changed = longer_by(ids_layout, **{name: value})[name]
    assert type(changed) is type(value)
    assert list(changed) == [5 + P, 2 + P]


UNTOUCHED = {
    "labels": torch.tensor([0, 1]),  # classes of sequences
    "label_ids": torch.randn(B, 4),
    "head_mask": torch.ones(B, T),
    "pixel_mask": torch.ones(B, 3),
    "decoder_input_ids": IDS,
    "decoder_attention_mask": PAD,
    "encoder_hidden_states": torch.randn(B, T, 4),
    "encoder_attention_mask": PAD,
    "tgt_mask": torch.ones(T, T),
    "max_length": 7,
    "label_lengths": torch.tensor([3, 4]),
    "tgt_lengths": [3, 4],
    "lens": torch.tensor([0.5, 0.7]),
    "temperature": torch.tensor(1.0),
    "past_key_values": None,
    "use_cache": True,
    "position": 3,
    "return_dict": True,
    "style": "plain",
    "labels_of_sentences": IDS[:, :3],
}


@pytest.mark.parametrize("name", UNTOUCHED)
def test_an_argument_that_is_none_of_the_sequence(name):
    assert list(longer_by(ids_layout, **{name: UNTOUCHED[name]})) == ["ids"]


@pytest.mark.parametrize(
    "value",
    [
        torch.randn(B, T),
        torch.randn(B, T, 4),
        torch.ones(B, T, dtype=INT),
        torch.ones(B, T, T),
        torch.ones(T, T),
    ],
    ids=lambda value: "x".join(map(str, value.shape)),
)
def test_an_unknown_argument_along_the_sequence_is_refused(value):
    with pytest.raises(
        PeftlibError, match=r"'importance' of shape .* length 5.*sequence_args=\{'importance': kind\}"
    ):
        longer_by(ids_layout, importance=value)
    assert "importance" not in longer_by(Layout("ids", "ids", given={"importance": "skip"}), importance=value)


@pytest.mark.parametrize(
    "kind", [k for k in KINDS if k not in ("embeds", "labels", "cache", "lengths", "offset", "skip")]
)
def test_a_named_kind_decides(kind):
    value = torch.ones(B, T, dtype=INT)
    changed = longer_by(Layout("ids", "ids", given={"thing": kind}), thing=value)["thing"]
    begin = {"ids": 7, "mask": 1, "padding_mask": 0, "loss_mask": 0, "types": 0}
    first = torch.arange(P) if kind == "positions" else torch.full((P,), begin.get(kind, 0))
    assert torch.equal(changed[:, :P], first.expand(B, P))
    assert torch.equal(changed[:, P:], value + P if kind == "positions" else value)


def test_a_named_kind_overrules_a_name():
    assert "labels" not in longer_by(Layout("ids", "ids", given={"labels": "skip"}), labels=IDS)


def test_labels_have_the_value_that_the_loss_ignores():
    assert torch.equal(longer_by(Layout("ids", "ids", ignored=-1), targets=IDS)["targets"], front(IDS, -1, 1))


def test_floating_labels_cannot_be_left_out_of_a_loss():
    with pytest.raises(PeftlibError, match=r"labels 'y' are torch.float32.*outside of the model"):
        longer_by(Layout("ids", "ids", given={"y": "labels"}), y=torch.randn(B, T))


def test_labels_of_a_decoder_are_not_the_encoders():
    layout = Layout("ids", "ids", paired=True)
    changed = longer_by(layout, labels=IDS, memory_key_padding_mask=PAD == 0, tgt_key_padding_mask=PAD == 0)
    assert sorted(changed) == ["ids", "memory_key_padding_mask"]
    assert torch.equal(changed["memory_key_padding_mask"], front(PAD == 0, False, 1))


def test_the_sequence_of_a_decoder():
    layout = Layout("tgt", "embeds", axis=-1, hides=True)
    tgt = torch.randn(B, T, 4)
    call = {
        "tgt": tgt,
        "memory": torch.randn(B, T, 4),
        "tgt_mask": ~causal(T),
        "memory_key_padding_mask": PAD == 0,
    }
    changed = lengthen(layout, call, P).changed
    assert sorted(changed) == ["tgt", "tgt_mask"]
    assert torch.equal(~changed["tgt_mask"], by_hand(causal(T), P, False))


def test_boolean_masks_of_attention_modules_mark_what_is_hidden():
    given_mask = {"mask": ~causal(T)}
    for layout, hides in ((Layout("ids", "ids", hides=True), True), (ids_layout, False)):
        real = decoded(given_mask["mask"], hides)
        changed = longer_by(layout, **given_mask)["mask"]
        assert decoded(changed, hides)[P:, :P].all()
        assert torch.equal(decoded(changed, hides)[P:, P:], real)
    # A padding mask, an integer one, an additive one and one whose kind is named are not concerned.
    layout = Layout("ids", "ids", hides=True, given={"named": "mask"})
    assert torch.equal(longer_by(layout, mask=PAD.bool())["mask"], front(PAD.bool(), True, 1))
    assert decoded(longer_by(layout, named=causal(T))["named"])[P:, :P].all()


def test_as_many_sequences_as_tokens():
    ids = torch.ones(T, T, dtype=INT)
    pad, square = torch.ones(T, T, dtype=BOOL), causal(T)

    def shape(layout: Layout, name: str, value: Tensor) -> tuple[int, ...]:
        return tuple(lengthen(layout, {"ids": ids, name: value}, P).changed[name].shape)

    assert shape(ids_layout, "attention_mask", pad) == (T, P + T)
    assert shape(ids_layout, "key_padding_mask", pad) == (T, P + T)
    assert shape(ids_layout, "mask", pad.long()) == (T, P + T)
    assert shape(ids_layout, "attn_mask", square) == (P + T, P + T)
    # The example told.
    assert shape(Layout("ids", "ids", square={"attn_mask": False}), "attn_mask", pad) == (T, P + T)
    assert shape(Layout("ids", "ids", square={"attention_mask": True}), "attention_mask", pad) == (
        P + T,
        P + T,
    )


def test_a_single_token_is_no_reason_to_grow_rows():
    layout = Layout("ids", "ids", square={"mask": False})
    call = {"ids": torch.ones(B, 1, dtype=INT), "mask": torch.zeros(B, 1, 1, 1)}
    assert lengthen(layout, call, P).changed["mask"].shape == (B, 1, 1, P + 1)
    assert lengthen(ids_layout, call, P).changed["mask"].shape == (B, 1, P + 1, P + 1)


def test_ids_without_a_batch():
    call = {"ids": IDS[0], "labels": IDS[0], "mask": PAD[1], "position_ids": torch.arange(T)}
    longer = lengthen(ids_layout, call, P, placeholder=7)
    assert longer.shape == (P + T,)
    assert torch.equal(longer.changed["ids"], front(IDS[0], 7, 0))
    assert torch.equal(longer.changed["labels"], front(IDS[0], -100, 0))
    assert torch.equal(longer.changed["mask"], front(PAD[1], 1, 0))
    assert torch.equal(longer.changed["position_ids"], torch.arange(P + T))


def test_ids_of_several_choices():
    ids = IDS.expand(3, B, T)
    longer = lengthen(
        ids_layout, {"ids": ids, "attention_mask": PAD.expand(3, B, T), "labels": torch.zeros(3)}, P
    )
    assert longer.shape == (3, B, P + T)
    assert sorted(longer.changed) == ["attention_mask", "ids"]


def test_the_sequence_first():
    layout = Layout("ids", "ids", axis=0)
    call = {
        "ids": IDS.T,
        "labels": IDS.T,
        "token_type_ids": PAD.T,
        "src_key_padding_mask": PAD == 0,
        "mask": causal(T),
        "position_ids": torch.arange(T)[:, None],
    }
    longer = lengthen(layout, call, P, placeholder=7)
    assert longer.shape == (P + T, B)
    assert torch.equal(longer.changed["ids"], front(IDS.T, 7, 0))
    assert torch.equal(longer.changed["labels"], front(IDS.T, -100, 0))
    assert torch.equal(longer.changed["token_type_ids"], front(PAD.T, 0, 0))
    assert torch.equal(longer.changed["src_key_padding_mask"], front(PAD == 0, False, 1))
    assert torch.equal(longer.changed["mask"], by_hand(causal(T), P, False))
    assert torch.equal(longer.changed["position_ids"], torch.arange(P + T)[:, None])


def test_embeddings_in_place_of_ids():
    embeds = torch.randn(B, T, 4)
    rows = torch.randn(P, 4)
    call = {"ids": None, "decoder_inputs_embeds": embeds + 1, "inputs_embeds": embeds, "labels": IDS}
    longer = lengthen(ids_layout, call, P, rows=lambda e: rows.expand(B, P, 4))
    assert sorted(longer.changed) == ["inputs_embeds", "labels"]
    assert torch.equal(longer.changed["inputs_embeds"], torch.cat([rows.expand(B, P, 4), embeds], 1))
    assert longer.shape == (B, P + T)


def test_a_call_without_the_sequence():
    with pytest.raises(
        PeftlibError, match=r"nothing to stand before.*came as 'ids', and this call has 'attention_mask'"
    ):
        lengthen(ids_layout, {"attention_mask": PAD}, P)
    longer = lengthen(ids_layout, {"ids": None, "encoder_outputs": torch.randn(B, T, 4)}, P)
    assert longer.changed == {}
    assert longer.shape == ()


def test_masks_over_a_memory_that_is_longer_already():
    memory = torch.randn(B, P + T, 4)
    for outputs in (memory, (memory,), {"last_hidden_state": memory}):
        call = {"ids": None, "encoder_outputs": outputs, "attention_mask": PAD, "decoder_attention_mask": PAD}
        longer = lengthen(Layout("ids", "ids", paired=True), call, P)
        assert longer.shape == ()
        assert list(longer.changed) == ["attention_mask"]
        assert torch.equal(longer.changed["attention_mask"], front(PAD, 1, 1))
    same = {"ids": None, "encoder_outputs": memory[:, P:], "attention_mask": PAD}
    assert lengthen(Layout("ids", "ids", paired=True), same, P).changed == {}


# -- caches ------------------------------------------------------------------------------------------------------------

KV = torch.randn(B, 2, 4, 3)


class Growing:
    def __init__(self, *tensors: Tensor):
        self.keys = list(tensors)


class Counting:
    """Allocated in full; says how much of it is used."""

    def __init__(self, used: int, name: str):
        self.keys = torch.empty(B, 2, 64, 3)
        setattr(self, name, used)


FILLED = {
    "tensor": KV,
    "tuple": ((KV, KV),),
    "list": [(None, None), (KV, KV)],
    "dict": {"0": {"k": KV, "v": KV}},
    "object": Growing(KV),
    "counter": Counting(4, "seen_tokens"),
    "length": Counting(4, "length"),
    "tensor counter": Counting(torch.tensor(4), "pos"),
    "method": SimpleNamespace(get_seq_length=lambda: 4),
    "allocated": torch.cat([KV, torch.zeros(B, 2, 60, 3)], 2),
}
EMPTY = {
    "tuple": (),
    "list": [],
    "nothing yet": [None, (None, None)],
    "tensor": KV[:, :, :0],
    "object": Growing(),
    "counter": Counting(0, "seen_tokens"),
    "tensor counter": Counting(torch.tensor(0), "pos"),
    "method": SimpleNamespace(get_seq_length=lambda: 0),
    "allocated": torch.zeros(B, 2, 64, 3),
    "allocated, in lists": [(torch.zeros(B, 2, 64, 3),) * 2],
}


@pytest.mark.parametrize("make", FILLED)
def test_a_filled_cache_holds_the_prompt(make):
    assert is_filled(FILLED[make])
    call = {
        "ids": IDS[:, -1:],
        "past_key_values": FILLED[make],
        "attention_mask": torch.ones(B, T + 1),
        "position_ids": torch.full((B, 1), T),
        "labels": IDS[:, -1:],
    }
    longer = lengthen(ids_layout, call, P)
    assert longer.shape == ()
    assert sorted(longer.changed) == ["attention_mask", "position_ids"]
    assert longer.changed["attention_mask"].shape == (B, P + T + 1)
    assert torch.equal(longer.changed["position_ids"], torch.full((B, 1), P + T))


@pytest.mark.parametrize("make", EMPTY)
def test_an_empty_cache_gets_the_prompt(make):
    assert not is_filled(EMPTY[make])
    assert torch.equal(longer_by(ids_layout, cache=EMPTY[make])["ids"], front(IDS, 7, 1))


@pytest.mark.parametrize(
    "name, value",
    [
        ("layers", [(KV, KV)]),
        ("tower", {"a": KV}),
        ("scratch", Growing(KV)),
        ("hidden", KV[0]),
        ("mems", [KV[0]]),
        ("states", (KV[0], KV[0])),
        ("kv", KV),
    ],
)
def test_what_may_carry_the_prompt_already_is_refused(name, value):
    words = f"'{name}' .* holds tensors.*sequence_args={{'{name}': 'cache'}}, or 'skip'"
    with pytest.raises(PeftlibError, match=words):
        longer_by(ids_layout, **{name: value})
    assert longer_by(Layout("ids", "ids", given={name: "skip"}), **{name: value}).keys() == {"ids"}
    assert lengthen(Layout("ids", "ids", given={name: "cache"}), {"ids": IDS, name: value}, P).shape == ()


@pytest.mark.parametrize(
    "value",
    [None, [], {}, [None], Growing(), SimpleNamespace(n=3), torch.zeros(0), print, torch.arange(3)],
)
def test_what_carries_nothing_is_not(value):
    assert longer_by(ids_layout, state=value).keys() == {"ids"}


def test_square_masks_with_a_cache_get_columns_alone():
    call = {"ids": IDS[:, :2], "past": KV, "mask": torch.ones(2, 4 + 2, dtype=BOOL)}
    assert lengthen(ids_layout, call, P).changed["mask"].shape == (2, P + 6)


def test_a_count_is_believed_before_a_cache():
    one = {"ids": IDS[:, :1], "cache": torch.randn(B, 2, 64, 3)}
    for name in ("start_pos", "input_pos", "offset", "past_length"):
        assert lengthen(ids_layout, {**one, name: 0}, P).shape == (B, P + 1)
        longer = lengthen(ids_layout, {**one, name: 6}, P)
        assert longer.shape == ()
        assert longer.changed == {name: P + 6}
        counted = lengthen(ids_layout, {**one, name: torch.tensor(6)}, P).changed
        assert int(counted[name]) == P + 6


def test_start_pos_counts_a_cache_inside_the_model():
    assert longer_by(ids_layout, start_pos=0).keys() == {"ids"}
    assert lengthen(ids_layout, {"ids": IDS[:, :1], "start_pos": 6}, P).changed == {"start_pos": P + 6}
    assert lengthen(ids_layout, {"ids": IDS[:, :1], "start_pos": 6}, P).shape == ()
    named = Layout("ids", "ids", given={"step": "offset"})
    assert lengthen(named, {"ids": IDS[:, :1], "step": 6}, P).changed == {"step": P + 6}
    # Without a cache an offset of positions is none of a cache.
    assert longer_by(ids_layout, offset=6).keys() == {"ids"}


def test_caches_are_not_read_in_fake_mode():
    with FakeTensorMode():
        assert is_filled(torch.zeros(B, 2, 4, 3))


# -- outputs -----------------------------------------------------------------------------------------------------------

NOTHING = Layout("ids", "ids")
LONG = (B, P + T)


def cut(output: Any, layout: Layout = NOTHING, shape: tuple[int, ...] = LONG) -> Any:
    return shorten(layout, output, P, shape)


@dataclass
class Plain:
    logits: Tensor
    pooled: Tensor | None = None


@dataclass(frozen=True)
class Frozen:
    logits: Tensor


Named = collections.namedtuple("Named", "logits pooled")


def test_containers_keep_their_kind():
    x, pooled = torch.randn(B, P + T, 4), torch.randn(B, 4)
    assert torch.equal(cut(x), x[:, P:])
    for made in (
        (x, pooled),
        [x, pooled],
        Named(x, pooled),
        {"logits": x, "pooled": pooled},
        collections.OrderedDict(logits=x, pooled=pooled),
        Plain(x, pooled),
    ):
        found = cut(made)
        assert type(found) is type(made)
        assert found is not made
        items = (
            found.values()
            if isinstance(found, dict)
            else vars(found).values()
            if isinstance(found, Plain)
            else found
        )
        a, b = items
        assert torch.equal(a, x[:, P:])
        assert b is pooled
    assert torch.equal(cut(Frozen(x)).logits, x[:, P:])
    assert torch.equal(cut({"deep": [(x, 3, None, "text")]})["deep"][0][0], x[:, P:])
    untouched = {"pooled": pooled, "n": 3}
    assert cut(untouched) is untouched


def learned(before: Any, after: Any, short=(B, T), long=LONG, **fields: Any) -> Layout:
    layout = Layout("ids", "ids", **fields)
    learn_outputs(layout, before, after, short, long)
    return layout


def test_growth_tells_axes():
    def outputs(n: int) -> dict[str, Tensor]:
        return {
            "channels_first": torch.randn(B, 4, n),
            "attention": torch.randn(B, 2, n, n),
            "time_first": torch.randn(n, B, 4),
            "pooled": torch.randn(B, P + T),
            "pairs": torch.randn(B, 2, 6, n),
            "flat": torch.randn(B * n, 4),
        }

    layout = learned(outputs(T), outputs(P + T))
    long = outputs(P + T)
    short = cut(long, layout)
    assert {k: tuple(v.shape) for k, v in short.items()} == {k: tuple(v.shape) for k, v in outputs(T).items()}
    assert torch.equal(short["attention"], long["attention"][..., P:, P:])
    assert short["pooled"] is long["pooled"]
    assert torch.equal(short["flat"], long["flat"].view(B, P + T, 4)[:, P:].reshape(B * T, 4))


def test_growth_tells_axes_for_other_batches_and_lengths():
    layout = learned(
        {"x": torch.randn(B, 4, T), "flat": torch.randn(B * T)},
        {"x": torch.randn(B, 4, P + T), "flat": torch.randn(B * (P + T))},
    )
    x, flat = torch.randn(3, 4, P + 9), torch.randn(3 * (P + 9))
    found = cut({"x": x, "flat": flat}, layout, (3, P + 9))
    assert torch.equal(found["x"], x[..., P:])
    assert torch.equal(found["flat"], flat.view(3, P + 9)[:, P:].reshape(-1))
    time_first = Layout("ids", "ids", axis=0)
    learn_outputs(time_first, torch.randn(B * T, 4), torch.randn(B * (P + T), 4), (T, B), (P + T, B))
    y = torch.randn((P + 9) * 3, 4)
    assert torch.equal(cut(y, time_first, (P + 9, 3)), y.view(P + 9, 3, 4)[P:].reshape(-1, 4))


def test_an_output_of_the_last_position_alone_in_the_example():
    # logits of the last token without targets, of all with them
    layout = learned((torch.randn(B, 1, 4), None), (torch.randn(B, 1, 4), None))
    logits = torch.randn(B, P + T, 4)
    assert torch.equal(cut((logits, None), layout)[0], logits[:, P:])
    last = (torch.randn(B, 1, 4), None)
    assert cut(last, layout) is last


def test_an_output_that_moved_with_other_arguments():
    layout = learned(torch.randn(B, 4, T), torch.randn(B, 4, P + T))
    logits = torch.randn(B, 4, P + T)
    assert torch.equal(cut((logits, torch.tensor(0.5)), layout)[0], logits[..., P:])


def test_other_growth_is_refused():
    with pytest.raises(TargetError, match=r"For 3 more positions .*'pooled' goes from \(2, 5\) to \(2, 6\)"):
        learned({"pooled": torch.randn(B, 5)}, {"pooled": torch.randn(B, 6)})
    with pytest.raises(
        TargetError, match=r"SimpleNamespace shows no tensors: return a tensor, or a tuple, mapping"
    ):
        learned(SimpleNamespace(x=torch.randn(2)), SimpleNamespace(x=torch.randn(2)))


def test_outputs_the_example_did_not_have():
    hidden, attention = torch.randn(B, P + T, 4), torch.randn(B, 2, P + T, P + T)
    found = cut({"hidden_states": (hidden,), "attentions": (attention,), "loss": torch.tensor(1.0)})
    assert torch.equal(found["hidden_states"][0], hidden[:, P:])
    assert torch.equal(found["attentions"][0], attention[..., P:, P:])


def test_outputs_of_a_decoder_as_long_as_the_prompted_encoder():
    layout = Layout("ids", "ids", paired=True)
    made = {
        "decoder_hidden_states": torch.randn(B, P + T, 4),
        "decoder_attentions": torch.randn(B, 2, P + T, P + T),
        "cross_attentions": torch.randn(B, 2, P + T, P + T),
        "encoder_last_hidden_state": torch.randn(B, P + T, 4),
    }
    found = cut(made, layout)
    assert found["decoder_hidden_states"] is made["decoder_hidden_states"]
    assert found["decoder_attentions"] is made["decoder_attentions"]
    assert torch.equal(found["cross_attentions"], made["cross_attentions"][..., P:])
    assert torch.equal(found["encoder_last_hidden_state"], made["encoder_last_hidden_state"][:, P:])


def test_caches_keep_the_prompt():
    x = torch.randn(B, P + T, 4)
    by_name = {"logits": x, "past_key_values": ((x, x),), "present": x, "my_cache": x}
    found = cut(by_name)
    assert torch.equal(found["logits"], x[:, P:])
    assert all(found[k] is by_name[k] for k in ("past_key_values", "present", "my_cache"))
    for keys in (torch.randn(B, 2, P + T, 3), torch.randn(B, P + T, 2, 3)):
        axis = keys.shape.index(P + T)
        layout = learned((x[:, P:], [keys.narrow(axis, P, T)]), (x, [keys]))
        assert cut((x, [keys]), layout)[1][0] is keys
        assert cut((x, [keys]))[1][0] is keys
    latent = torch.randn(B, P + T, 6)
    assert cut((x, latent), Layout("ids", "ids", given={"1": "cache"}))[1] is latent
    assert torch.equal(cut((x, latent))[1], latent[:, P:])


def test_an_output_proper_of_four_axes_is_no_cache():
    image = torch.randn(B, P + T, 2, 3)
    layout = learned(image[:, P:], image)
    assert torch.equal(cut(image, layout), image[:, P:])


# -- there and back ----------------------------------------------------------------------------------------------------


@st.composite
def calls(draw: Any) -> tuple[Layout, dict[str, Tensor], int, tuple[int, ...]]:
    """A call of some of the arguments there are, for ids or vectors, sequence first or last."""
    batch, tokens, extra = draw(sizes), draw(sizes), draw(sizes)
    time_first, kind = draw(st.booleans()), draw(st.sampled_from(["ids", "embeds"]))
    shape = (tokens, batch) if time_first else (batch, tokens)
    main = torch.randint(0, 9, shape) if kind == "ids" else torch.randn(*shape, 3)
    whole = torch.randint(0, 2, shape)
    options = {
        "labels": whole,
        "token_type_ids": whole,
        "position_ids": torch.arange(tokens),
        "key_padding_mask": torch.randint(0, 2, (batch, tokens)).bool(),
        "attention_mask": torch.randint(0, 2, (batch, tokens)),
        "attn_mask": torch.ones(batch, 1, tokens, tokens, dtype=BOOL).tril(),
    }
    chosen = draw(st.sets(st.sampled_from(sorted(options))))
    layout = Layout("x", kind, axis=0 if time_first else -1)
    return layout, {"x": main} | {k: options[k] for k in chosen}, extra, shape


@given(calls())
def test_shortening_what_was_lengthened_gives_the_original(made):
    layout, call, extra, shape = made
    longer = lengthen(layout, call, extra)
    axis = layout.axis % 2
    assert longer.shape == tuple(n + extra * (i == axis) for i, n in enumerate(shape))
    assert longer.changed.keys() == call.keys()
    for name, value in call.items():
        new = longer.changed[name]
        grown = [i for i, (a, b) in enumerate(zip(value.shape, new.shape, strict=True)) if a != b]
        assert all(new.shape[i] == value.shape[i] + extra for i in grown)
        assert len(grown) == (2 if name == "attn_mask" else 1)
        back_again = new
        for i in grown:
            back_again = back_again.narrow(i, extra, value.shape[i])
        assert torch.equal(back_again, value + extra if name == "position_ids" else value)
        learned_axes = Layout("x", layout.kind, axis=layout.axis)
        learn_outputs(learned_axes, {name: value}, {name: new}, shape, longer.shape)
        if name != "position_ids":
            assert torch.equal(shorten(learned_axes, {name: new}, extra, longer.shape)[name], value)


# -- calls by name -----------------------------------------------------------------------------------------------------


class Forward:
    def forward(self, a, b=None, *, c=None, **more):
        raise AssertionError


def test_arguments_by_name_and_back():
    names = argument_names(Forward.forward)
    assert names == argument_names(Forward().forward) == ["a", "b"]
    args, kwargs = (1, 2, 3), {"c": 4, "d": 5}
    call = by_name(names, args, kwargs)
    assert call == {"a": 1, "b": 2, "#2": 3, "c": 4, "d": 5}
    assert back(names, args, kwargs, {"b": 20, "#2": 30, "d": 50}) == ((1, 20, 30), {"c": 4, "d": 50})
