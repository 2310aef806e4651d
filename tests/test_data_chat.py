"""Prompts through a chat template: tokenized once, one BOS, and the template is known afterwards."""

import copy
from typing import Any

import pytest

from locedit.data import Dataset, Fact, Task, encode, resolve_chat
from locedit.errors import LoceditError
from tests import tokens

LLAMA = "{{ bos_token }}{% for message in messages %}[INST] {{ message['content'] }} [/INST]{% endfor %}"
LINES = "{% for message in messages %}user: {{ message['content'] }}\n{% endfor %}" + (
    "{% if add_generation_prompt %}answer:\n{% endif %}"
)
FACT = Fact(prompt="where is Paris?", answer=" France", id="f", subject="where is")


def with_template(template: Any) -> tokens.Encodes:
    tokenizer = copy.deepcopy(tokens.sentence_piece())
    tokenizer.chat_template = template
    return tokens.Encodes(tokenizer)


def test_own_template_brings_the_only_bos() -> None:
    model = with_template(LLAMA)
    [example] = encode(model, [FACT], chat="auto")
    text = "[INST] where is Paris? [/INST] France"
    assert example.ids == tuple(model.tokenizer(text).input_ids)
    assert example.ids.count(model.tokenizer.bos_token_id) == 1
    assert model.tokenizer.decode(list(example.ids[example.targets[0] :])).strip() == "France"
    assert model.tokenizer.decode(list(example.ids[example.subject.start : example.subject.end])).strip() == "where is"


def test_own_template_without_bos_gets_none() -> None:
    model = with_template(LINES)
    [own] = encode(model, [FACT], chat="auto")
    assert model.tokenizer.bos_token_id not in own.ids
    given = tokens.Encodes(tokens.sentence_piece())
    assert encode(given, [FACT], chat=LINES)[0].ids == (given.tokenizer.bos_token_id, *own.ids)


def test_answer_loses_its_space_after_a_line_end() -> None:
    model = with_template(LINES)
    [example] = encode(model, [FACT], chat="auto")
    assert example.ids == tuple(
        model.tokenizer("user: where is Paris?\nanswer:\nFrance", add_special_tokens=False).input_ids
    )


def test_pattern_with_prompt() -> None:
    model = tokens.causal("sentence_piece")
    for pattern in ("Question: {prompt} Answer:", "Question: {prompt} Answer: "):
        [example] = encode(model, [FACT], chat=pattern)
        assert example.ids == tuple(model.tokenizer("Question: where is Paris? Answer: France").input_ids)


def test_subject_is_that_of_the_prompt_and_not_of_the_template() -> None:
    model = tokens.causal("sentence_piece")
    [example] = encode(model, [FACT], chat="Tell me where is what: {prompt} Answer:")
    assert model.tokenizer.decode(list(example.ids[: example.subject.end])).endswith("what: where is")


def test_auto_is_off_without_a_template() -> None:
    model = tokens.causal("sentence_piece")
    assert encode(model, [FACT], chat="auto") == encode(model, [FACT], chat="off") == encode(model, [FACT])
    assert resolve_chat(model.tokenizer, "auto").template is None
    assert resolve_chat(with_template(LLAMA).tokenizer, "auto").template == LLAMA


def test_setting_of_the_data_set_is_used_and_hashed() -> None:
    model = with_template(LLAMA)
    plain = Dataset(items=(FACT,), source="facts")
    asked = Task(forget=plain).with_chat("auto").forget
    assert encode(model, asked) == encode(model, plain, chat="auto") != encode(model, plain)
    assert asked.hash != plain.hash
    assert encode(model, asked[:1]) == encode(model, asked)


@pytest.mark.parametrize(
    ("chat", "reason"),
    [
        ("on", "neither 'auto', 'off'"),
        ("{{ messages[0]['content'] ", "chat template failed"),
        ("{{ raise_exception('no system') }}", "no system"),
    ],
)
def test_bad_templates(chat: str, reason: str) -> None:
    with pytest.raises(LoceditError, match=reason) as caught:
        encode(tokens.causal("sentence_piece"), [FACT], chat=chat)
    assert "\n" not in str(caught.value)


def test_several_templates_need_a_choice() -> None:
    with pytest.raises(LoceditError, match="several templates .*default"):
        resolve_chat(with_template({"default": LLAMA, "tools": LINES}).tokenizer, "auto")
