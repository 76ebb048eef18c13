"""A tokenizer's own chat template: what is trained, turn for turn, is what it writes for an assistant."""

from __future__ import annotations

import json

import pytest

from peftlib import PeftlibError
from peftlib.train import ChatTemplate, as_tokenizer, encode, read_jsonl
from peftlib.train.cli import main

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHATML
)
CHANGES = (
    "{% for m in messages %}"
    "{{ '[' + m['role'] + ']' + ('' if loop.last else 'old:') + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
TURNS = [
    ("system", "简洁"),
    ("user", "一加一？"),
    ("assistant", "二 "),
    ("user", "加三？"),
    ("assistant", "五"),
]


def tokenizer(template, end="<|im_end|>"):
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    text = "".join(content for _, content in TURNS) + "[]systemuserassistant\n "
    words = {c: i for i, c in enumerate(dict.fromkeys(text))}
    specials = ["<|im_start|>", "<|im_end|>", "</s>", "<unk>"]
    words |= {token: len(words) + i for i, token in enumerate(specials)}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token=end, unk_token="<unk>", additional_special_tokens=specials[:3]
    )
    made.chat_template = template
    return made


def read(tmp_path, own, turns=TURNS):
    path = tmp_path / "data.jsonl"
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    path.write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    return read_jsonl(path, template=ChatTemplate(own))[0]


def test_every_assistant_turn_is_trained_with_its_end_and_nothing_else(tmp_path):
    own = tokenizer(CHATML)
    example = read(tmp_path, own)
    assert [text for text, trained in example.segments if trained] == ["二 <|im_end|>", "五<|im_end|>"]
    found = encode(example, as_tokenizer(own))
    # the ids that the template itself gives, but for the white space after the last end
    messages = [{"role": role, "content": content} for role, content in TURNS]
    expected = own(own.apply_chat_template(messages, tokenize=False), add_special_tokens=False)["input_ids"]
    assert found.ids == expected[:-1]
    assert own.decode([i for i in found.labels if i != -100]) == own.decode(
        own("二 <|im_end|>五<|im_end|>")["input_ids"]
    )
    assert found.ids.count(own.eos_token_id) == 5


def test_a_template_without_an_end_of_turn_gets_the_tokenizers(tmp_path):
    example = read(tmp_path, tokenizer(NO_END, "</s>"), TURNS[1:])
    assert example.segments == (
        ("[user]一加一？\n[assistant]", False),
        ("二</s>", True),
        (" \n[user]加三？\n[assistant]", False),
        ("五</s>", True),
    )


TRIMS = NO_END.replace("m['content']", "m['content'] | trim")


def test_a_template_that_trims_what_is_said_gets_the_end_too(tmp_path):
    example = read(tmp_path, tokenizer(TRIMS, "</s>"), [("user", "一 "), ("assistant", " 二 ")])
    assert example.segments[-1] == ("二</s>", True)


def test_the_end_may_be_named_and_has_to_be_known_where_it_is_needed(tmp_path):
    turns = [("user", "a"), ("assistant", "b")]
    own = tokenizer(NO_END, None)
    assert ChatTemplate(own, eos="</s>").segments(turns)[-1] == ("b</s>", True)
    assert ChatTemplate(tokenizer(CHATML, None)).segments(turns)[-1] == ("b<|im_end|>", True)
    with pytest.raises(
        PeftlibError, match=r"line 1: the chat template writes no end.*ChatTemplate\(tokenizer, eos="
    ):
        read(tmp_path, own, turns)


def test_the_shells_end_reaches_the_template(tmp_path, capsys):
    tokenizer(NO_END, None).save_pretrained(tmp_path / "own")
    row = {"messages": [{"role": role, "content": content} for role, content in TURNS[1:]]}
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    (tmp_path / "model.py").write_text(
        "from torch import nn\ndef build():\n    return nn.Sequential(nn.Embedding(99, 8), nn.Linear(8, 99))\n"
    )
    files = ["--model", f"{tmp_path / 'model.py'}:build", "--data", str(tmp_path / "data.jsonl")]
    options = [
        "--tokenizer",
        str(tmp_path / "own"),
        "--targets",
        "1",
        "--steps",
        "1",
        "--out",
        str(tmp_path / "o"),
    ]
    assert main(["sft", *files, *options, "--eos", "</s>"]) == 0
    # two characters, each with its end
    assert "4 of them trained" in capsys.readouterr().out


def test_instructions_go_through_it_too(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}')
    (example,) = read_jsonl(path, template=ChatTemplate(tokenizer(CHATML)))
    assert example.segments[0] == ("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", False)
    assert example.segments[1:] == (("b<|im_end|>", True),)


def test_what_a_template_cannot_say_is_named_with_its_line(tmp_path):
    for template, turns, message in (
        (NO_SYSTEM, TURNS, "line 1: the chat template refuses turns of system.*no system here"),
        (CHANGES, TURNS[1:], "line 1: the chat template writes turn 1 differently"),
        (CHATML, TURNS[2:], "line 1: the first turn is the assistant's"),
    ):
        with pytest.raises(PeftlibError, match=message):
            read(tmp_path, tokenizer(template), turns)
    with pytest.raises(PeftlibError, match="has no chat template"):
        ChatTemplate(tokenizer(None))
