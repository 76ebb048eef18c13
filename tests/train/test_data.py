"""From files to rows: shapes, templates, tokenizers, padding, packing; Chinese text among them."""

from __future__ import annotations

import itertools
import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import default_collate

from peftlib import PeftlibError
from peftlib.train import (
    Batches,
    Encoded,
    Example,
    Preference,
    Template,
    as_tokenizer,
    byte_tokenizer,
    causal_lm,
    document_mask,
    encode,
    fit,
    pack,
    pad,
    padder,
    read_jsonl,
    split,
)

BYTES = byte_tokenizer()


def written(tmp_path, *rows):
    tmp_path.mkdir(exist_ok=True)
    path = tmp_path / "data.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_the_four_shapes_are_told_apart(tmp_path):
    asked = "### User:\n{}\n\n### Assistant:\n".format
    cases = [
        (
            {"instruction": "翻译成英文", "input": "你好，世界", "output": "Hello, world"},
            ((asked("翻译成英文\n\n你好，世界"), False), ("Hello, world", True)),
        ),
        ({"instruction": "写诗", "output": "床前明月光"}, ((asked("写诗"), False), ("床前明月光", True))),
        ({"prompt": "首都：", "completion": "北京", "id": 3}, (("首都：", False), ("北京", True))),
        (
            {
                "messages": [
                    {"role": "system", "content": "{简洁}"},
                    {"role": "user", "content": "一加一？"},
                    {"role": "assistant", "content": "二"},
                    {"role": "user", "content": "加三？"},
                    {"role": "assistant", "content": "五"},
                ]
            },
            (
                ("{简洁}\n\n" + asked("一加一？"), False),
                ("二", True),
                ("\n\n" + asked("加三？"), False),
                ("五", True),
            ),
        ),
    ]
    for row, segments in cases:
        path = written(tmp_path, "", row)
        assert read_jsonl(path) == [Example(segments, f"{path}, line 2")]
    row = {"prompt": "评价：", "chosen": "很好", "rejected": "不好"}
    path = written(tmp_path, row)
    assert read_jsonl(path) == [Preference("评价：", "很好", "不好", f"{path}, line 1")]


def test_a_line_may_hold_a_line_separator_and_a_file_its_mark(tmp_path):
    path = written(tmp_path, {"prompt": "a\u2028b", "completion": "c\x85d"})
    path.write_text("\ufeff" + path.read_text(encoding="utf-8"), encoding="utf-8")
    assert read_jsonl(path)[0].segments == (("a\u2028b", False), ("c\x85d", True))


GOOD = {"prompt": "问", "completion": "答"}
SAID = {"role": "assistant", "content": "好"}


@pytest.mark.parametrize(
    "rows, message",
    [
        ([GOOD, '{"prompt": '], "line 2: this is not JSON"),
        ([GOOD, "[1]"], "line 2: this is a JSON list"),
        ([{"text": "x"}], "line 1: the keys are text.*instruction, output; messages; prompt"),
        ([GOOD, {"prompt": "x"}], "line 2: 'completion' is missing"),
        ([GOOD, {"prompt": "x", "completion": 3}], "line 2: 'completion' is a number"),
        ([{"prompt": "x", "completion": " "}], "line 1: 'completion' is empty"),
        ([{"prompt": "x", "completion": None}], "line 1: 'completion' is null. Write a text"),
        ([GOOD, {"prompt": "x", "completion": ["y"]}], "line 2: 'completion' is a list"),
        (
            [{"prompt": "x", "chosen": [{"role": "user"}], "rejected": "z"}],
            r"'chosen' is a list.*\{.chosen.: ",
        ),
        (
            [GOOD, r'{"prompt": "x", "completion": "a\ud83d"}'],
            r"line 2: 'completion' has half a char.*'.ud83d' at 1",
        ),
        (
            [r'{"messages": [{"role": "user", "content": "\udc00"}]}'],
            r"messages\[0\]: 'content' has half a char",
        ),
        ([{"instruction": "", "output": "y"}], "'instruction' is empty"),
        ([{"prompt": "x", "chosen": "y", "rejected": "y"}], "the same text"),
        ([{"messages": []}], "'messages' is no list"),
        ([{"messages": ["x"]}], r"messages\[0\]: this is no object"),
        ([{"messages": [SAID, {"role": "bot", "content": "x"}]}], r"messages\[1\]: 'role' is 'bot'"),
        ([{"messages": [{"role": "user"}]}], r"messages\[0\]: 'content' is missing"),
        ([{"messages": [SAID, {"role": "user", "content": "x"}]}], "ends with 'user'"),
        ([""], "has no example"),
    ],
)
def test_what_is_wrong_is_named_by_file_line_and_key(tmp_path, rows, message):
    with pytest.raises(PeftlibError, match=message):
        read_jsonl(written(tmp_path, *rows))


def test_null_is_what_is_left_out(tmp_path):
    path = written(tmp_path, {"instruction": "a", "input": None, "output": "b"})
    other = written(tmp_path / "other", {"instruction": "a", "output": "b"})
    assert read_jsonl(path)[0].segments == read_jsonl(other)[0].segments
    path = written(tmp_path, {"prompt": None, "completion": "b"})
    assert read_jsonl(path)[0].segments == (("", False), ("b", True))


def test_files_that_are_not_there_or_not_text(tmp_path):
    with pytest.raises(PeftlibError, match="There is no file"):
        read_jsonl(tmp_path / "none.jsonl")
    (tmp_path / "gbk.jsonl").write_bytes('{"prompt": "问"}'.encode("gbk"))
    with pytest.raises(PeftlibError, match="not UTF-8"):
        read_jsonl(tmp_path / "gbk.jsonl")


def test_a_template_needs_a_place_for_the_text():
    with pytest.raises(PeftlibError, match=r"needs \{content\}"):
        Template(user="User: ")


@given(st.text())
def test_bytes_come_back_whatever_the_text(text):
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return  # half a surrogate pair is no text
    ids = BYTES.encode(text)
    assert BYTES.decode([*ids, BYTES.eos_id]) == text
    assert all(0 <= i < 256 for i in ids)


def word_level():
    tokenizers = pytest.importorskip("tokenizers")
    words = {"</s>": 0, "<unk>": 1, "你": 2, "好": 3, "吗": 4}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 0)]
    )
    return tokenizer


def test_tokenizers_of_others():
    plain = word_level()
    transformers = pytest.importorskip("transformers")
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token="</s>", unk_token="<unk>"
    )
    for tokenizer in (as_tokenizer(plain, eos="</s>"), as_tokenizer(wrapped)):
        assert tokenizer.encode("你好") == [2, 3]
        assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocabulary) == (0, 0, 5)
        assert "好" in tokenizer.decode([3, 0])
    for bad, message in (
        (lambda: as_tokenizer(plain), "has no end token, and"),
        (lambda: as_tokenizer(plain, eos="<end>"), "no end token '<end>'"),
        (lambda: as_tokenizer(wrapped, eos="<end>"), "no end token '<end>'"),
        (lambda: as_tokenizer(plain, eos="</s>", pad="<pad>"), "no token '<pad>'"),
        (lambda: as_tokenizer("words"), "str is no tokenizer"),
    ):
        with pytest.raises(PeftlibError, match=message):
            bad()


def test_completions_alone_are_trained_with_their_end():
    example = Example((("问", False), ("答", True), ("再", False), ("好", True)))
    found = encode(example, BYTES)
    question, answer, again, good = (list(c.encode()) for c in "问答再好")
    end, none = [BYTES.eos_id], [-100] * 3
    assert found.ids == question + answer + end + again + good + end
    assert found.labels == none + answer + end + none + good + end
    assert encode(example, BYTES, whole=True).labels == found.ids


def test_what_is_too_long_loses_the_beginning_of_its_prompt():
    example = Example((("abcdef", False), ("xy", True)), "f.jsonl, line 4")
    found = encode(example, BYTES, max_length=5)
    assert (found.ids, found.labels) == ([101, 102, 120, 121, 257], [-100, -100, 120, 121, 257])
    encode(example, BYTES, max_length=4)
    with pytest.raises(
        PeftlibError, match=r"f\.jsonl, line 4: the last completion has 3 tokens and max_length=3"
    ):
        encode(example, BYTES, max_length=3)
    with pytest.raises(PeftlibError, match="nothing to train on"):
        encode(Example((("abc", False),)), BYTES)


def test_what_is_too_long_loses_its_early_turns():
    example = Example((("qq", False), ("aaaa", True), ("uvwxyz", False), ("b", True)))
    end = BYTES.eos_id
    whole = encode(example, BYTES)  # 2, 4 + 1, 6, 1 + 1
    assert encode(example, BYTES, max_length=15) == whole
    for length in (
        14,
        13,
        9,
    ):  # some of the question, all of it, some of the answer: that answer is not trained
        found = encode(example, BYTES, max_length=length)
        assert found.ids == whole.ids[-length:]
        assert [label for label in found.labels if label != -100] == (
            [*b"aaaa", end, *b"b", end] if length == 14 else [*b"b", end]
        )
    found = encode(example, BYTES, max_length=3)
    assert (found.ids, found.labels) == ([*b"zb", end], [-100, *b"b", end])
    with pytest.raises(PeftlibError, match="the last completion has 2 tokens and max_length=2"):
        encode(example, BYTES, max_length=2)
    assert encode(example, BYTES, max_length=9, whole=True).labels == whole.ids[-9:]


def begun(single, **named):
    transformers = pytest.importorskip("transformers")
    plain = word_level()
    plain.add_special_tokens(["<s>"])
    specials = [(token, plain.token_to_id(token)) for token in ("<s>", "</s>")]
    plain.post_processor = pytest.importorskip("tokenizers").processors.TemplateProcessing(
        single=single, special_tokens=specials
    )
    own = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token="</s>", unk_token="<unk>", **named
    )
    return plain, own


@pytest.mark.parametrize(
    "single, begins",
    [("<s> $A", "<s>"), ("<s> $A </s>", "<s>"), ("</s> $A", "</s>"), ("$A </s>", None), ("$A", None)],
)
def test_examples_begin_as_the_tokenizer_begins(single, begins):
    plain, own = begun(single, bos_token="<s>")  # having a token of that name is not beginning with it
    for tokenizer in (as_tokenizer(plain, eos="</s>"), as_tokenizer(own)):
        begin = [] if begins is None else [plain.token_to_id(begins)]
        assert tokenizer.bos_id == (begin[0] if begin else None)
        example = Example((("你", False), ("好", True)))
        found = encode(example, tokenizer)
        assert found.ids == [*begin, 2, 3, 0]
        assert found.labels == [-100] * len(begin) + [-100, 3, 0]
        assert encode(Example((("", False), ("好", True), *example.segments)), tokenizer).ids[:1] == (
            begin or [3]
        )
        (piece,) = split("你好", tokenizer, 8)
        assert piece.ids == [*begin, 2, 3, 0]
    for empty in ("", "<s>" if begins == "<s>" else ""):
        with pytest.raises(PeftlibError, match="split takes a text"):
            split(empty, tokenizer, 4)


def test_what_is_cut_begins_as_before_and_a_written_beginning_is_not_doubled():
    _, own = begun("<s> $A", bos_token="<s>")
    tokenizer = as_tokenizer(own)
    bos = tokenizer.bos_id
    found = encode(Example((("你好吗", False), ("好", True))), tokenizer, max_length=4)
    assert (found.ids, found.labels) == ([bos, 4, 3, 0], [-100, -100, 3, 0])
    with pytest.raises(PeftlibError, match="nothing would be left of the prompt"):
        encode(Example((("你好吗", False), ("好", True))), tokenizer, max_length=3)
    assert encode(Example((("<s>你", False), ("好", True))), tokenizer).ids == [bos, 2, 3, 0]
    long = Example((("<s>你好吗", False), ("好</s>", True)), closed=True)
    assert encode(long, tokenizer, max_length=4).ids == [bos, 4, 3, 0]
    # a chat template has written all there is
    assert encode(Example((("你", False), ("好</s>", True)), closed=True), tokenizer).ids == [2, 3, 0]
    # one token after the beginning can be trained
    assert encode(Example((("", False), ("好", True))), tokenizer).labels == [-100, 3, 0]


@given(text=st.text("ab天", min_size=1, max_size=30), length=st.integers(2, 9), data=st.data())
def test_a_long_text_is_trained_token_for_token_once(text, length, data):
    context = data.draw(st.integers(1, length - 1))
    pieces = split(text, BYTES, length, context=context)
    ids = [*text.encode(), BYTES.eos_id]
    # a causal loss never predicts a piece's first token
    assert [label for piece in pieces for label in piece.labels[1:] if label != -100] == ids[1:]
    for before, piece in itertools.pairwise(pieces):
        assert piece.ids[:context] == before.ids[-context:]
    assert all(len(piece.ids) == length for piece in pieces[:-1])
    assert context < len(pieces[-1].ids) <= length or len(pieces) == 1


@pytest.mark.parametrize("text, length, context", [("", 4, 1), ("ab", 3, 3), ("ab", 3, 0)])
def test_a_text_that_cannot_be_split_is_named(text, length, context):
    with pytest.raises(PeftlibError, match="split takes a text"):
        split(text, BYTES, length, context=context)


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_end_is_trained_where_it_pads_too(side):
    rows = [Encoded([5, 2], [-100, 2]), Encoded([6, 7, 8, 2], [-100, 7, 8, 2])]
    batch = pad(rows, pad_id=2, side=side, multiple=5)
    assert batch["inputs"].shape == (2, 5)
    for row, example in enumerate(rows):
        real = batch["attention_mask"][row]
        assert batch["inputs"][row][real].tolist() == example.ids
        assert batch["labels"][row][real].tolist() == example.labels
        assert (batch["inputs"][row][~real] == 2).all()
        assert (batch["labels"][row][~real] == -100).all()


def test_padding_refuses():
    for arguments in (([], 0), ([Encoded([1], [1])], 0)):
        with pytest.raises(PeftlibError, match="pad takes examples"):
            pad(*arguments, side="middle")


encoded = st.lists(st.integers(1, 9), min_size=1, max_size=8).map(lambda ids: Encoded(ids, ids))


@given(st.lists(encoded, min_size=1, max_size=9))
def test_packed_rows_hold_every_document_once(examples):
    rows = pack(examples, 8, pad_id=0)
    found = []
    for row in rows:
        assert all(len(column) == 8 for column in row.values())
        for number in range(int(row["documents"].max()) + 1):
            here = row["documents"] == number
            ids = row["inputs"][here].tolist()
            assert row["positions"][here].tolist() == list(range(len(ids)))
            assert row["labels"][here].tolist() == [-100, *ids[1:]]
            found.append(ids)
        assert (row["labels"][row["documents"] == -1] == -100).all()
    assert sorted(found) == sorted(e.ids for e in examples)
    assert sum(len(e.ids) for e in examples) > 8 * (len(rows) - 1) / 2


def test_a_document_longer_than_a_row_is_named():
    with pytest.raises(PeftlibError, match="Example 1 has 3 tokens and a row 2"):
        pack([Encoded([1], [1]), Encoded([1, 2, 3], [1, 2, 3])], 2, pad_id=0)


class Attends(nn.Module):
    """One attention over learned positions, with an optional mask."""

    def __init__(self, vocabulary=258, width=16):
        super().__init__()
        self.embed, self.place = nn.Embedding(vocabulary, width), nn.Embedding(64, width)
        self.qkv, self.head = nn.Linear(width, 3 * width), nn.Linear(width, vocabulary)

    def forward(self, ids, positions=None, mask=None):
        if positions is None:
            positions = torch.arange(ids.shape[1]).expand_as(ids)
        x = self.embed(ids) + self.place(positions)
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.head(x + y[:, 0])


def test_packed_documents_give_what_each_gives_alone():
    model = Attends().double()
    texts = ["你好", "再见吗", "好", "谢谢"]
    examples = [encode(Example((("问：", False), (text, True))), BYTES) for text in texts]
    expected = torch.stack([causal_lm(model, pad([example], BYTES.pad_id))[0] for example in examples]).sum()
    rows = pack(examples, 32, BYTES.pad_id)
    assert len(rows) < len(examples)
    together = default_collate(rows)
    mask = document_mask(together["documents"])
    inputs = {"ids": together["inputs"], "positions": together["positions"], "mask": mask}
    total, count = causal_lm(model, {"inputs": inputs, "labels": together["labels"]})
    torch.testing.assert_close(total, expected)
    assert count == sum(label != -100 for e in examples for label in e.labels[1:])
    with pytest.raises(PeftlibError, match="later documents would read earlier"):
        causal_lm(model, together)
    # without the mask, documents read one another: the comparison would notice
    leaky, _ = causal_lm(model, {"inputs": together["inputs"], "labels": together["labels"]})
    assert not torch.allclose(leaky, expected)


@pytest.mark.parametrize("pad_id", [BYTES.pad_id, BYTES.eos_id])
def test_a_model_learns_to_answer_in_chinese_and_to_stop(tmp_path, pad_id):
    """From file to answer, with padding of its own and with the end token as padding."""
    pairs = {"天": "地", "上": "下面", "大": "小"}
    path = written(tmp_path, *({"prompt": q, "completion": a} for q, a in pairs.items()))
    examples = [encode(example, BYTES) for example in read_jsonl(path)]
    batches = Batches(examples, 3, partial(pad, pad_id=pad_id))
    torch.manual_seed(0)
    model = Attends()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    history = fit(model, batches, causal_lm, optimizer=optimizer, steps=120)
    assert history.last("loss") < 0.05
    for question, answer in pairs.items():
        ids = BYTES.encode(question)
        while ids[-1] != BYTES.eos_id and len(ids) < 20:
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        assert BYTES.decode(ids) == question + answer
        assert ids[-1] == BYTES.eos_id


def test_padder_is_a_collate():
    batch = padder(BYTES, side="left")([Encoded([1, 2], [1, 2]), Encoded([3], [3])])
    assert batch["inputs"].tolist() == [[1, 2], [256, 3]]
