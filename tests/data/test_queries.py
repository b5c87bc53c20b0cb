"""Where the context stands among the tokens of a query."""

from __future__ import annotations

import dataclasses

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from toy import CHAT_TEMPLATE, SPECIAL_TOKENS, make_model, make_tokenizer
from transformers import PreTrainedTokenizerFast

from softprompt_fast.base_model.decoding import end_ids
from softprompt_fast.data.queries import (
    cut_context,
    student_layout,
    teacher_ids,
    tokenize_answer,
    tokenize_query,
)
from softprompt_fast.data.records import Record
from softprompt_fast.teacher.examples import make_examples
from softprompt_fast.teacher.teacher import Teacher

USER = {"role": "user", "content": "When do you open?"}
OWN_SYSTEM = {"role": "system", "content": "Be brief."}
ASSISTANT = "<|start|>assistant\n"
NO_SYSTEM_ROLE = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
)
SILENT_ABOUT_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{% set messages = messages[1:] %}{% endif %}"
)


def with_template(start: str = "", end: str = ""):
    tokenizer = make_tokenizer.__wrapped__()
    tokenizer.chat_template = start + tokenizer.chat_template + end
    return tokenizer


def test_the_context_is_the_system_message():
    tokenizer = make_tokenizer()
    query = tokenize_query(tokenizer, [USER], " Open at 10.\n", source="data.jsonl:1")
    assert tokenizer.decode(teacher_ids(query)) == (
        f"<|start|>system\nOpen at 10.<|end|>\n<|start|>user\nWhen do you open?<|end|>\n{ASSISTANT}"
    )
    assert tokenizer.decode(query.context) == "Open at 10."
    assert tokenizer.decode(query.plain) == f"<|start|>user\nWhen do you open?<|end|>\n{ASSISTANT}"
    assert query.source == "data.jsonl:1"


def test_a_system_message_of_the_data_follows_the_context():
    tokenizer = make_tokenizer()
    query = tokenize_query(tokenizer, [OWN_SYSTEM, USER], "Open at 10.")
    text = tokenizer.decode(teacher_ids(query))
    assert text.startswith("<|start|>system\nOpen at 10.\n\nBe brief.<|end|>\n<|start|>user\nWhen")
    assert tokenizer.decode(query.plain).startswith("<|start|>system\nBe brief.<|end|>")


@pytest.mark.parametrize("template", [NO_SYSTEM_ROLE, SILENT_ABOUT_SYSTEM], ids=["raise", "drop"])
def test_without_a_system_role_the_context_opens_the_first_user_message(template):
    tokenizer = with_template(template)
    query = tokenize_query(tokenizer, [OWN_SYSTEM, USER], "Open at 10.")
    assert tokenizer.decode(teacher_ids(query)) == (
        f"<|start|>user\nOpen at 10.\n\nBe brief.\n\nWhen do you open?<|end|>\n{ASSISTANT}"
    )
    assert tokenizer.decode(query.plain) == (
        f"<|start|>user\nBe brief.\n\nWhen do you open?<|end|>\n{ASSISTANT}"
    )


@pytest.mark.parametrize("template", [NO_SYSTEM_ROLE, SILENT_ABOUT_SYSTEM], ids=["raise", "drop"])
@pytest.mark.parametrize("role", ["assistant", "developer"])
def test_the_first_user_message_need_not_be_the_first(template, role):
    tokenizer = with_template(template)
    first = {"role": role, "content": "Hello."}
    query = tokenize_query(tokenizer, [OWN_SYSTEM, first, USER], "Open at 10.")
    assert tokenizer.decode(teacher_ids(query)) == (
        f"<|start|>{role}\nHello.<|end|>\n"
        f"<|start|>user\nOpen at 10.\n\nBe brief.\n\nWhen do you open?<|end|>\n{ASSISTANT}"
    )
    assert tokenizer.decode(query.plain) == (
        f"<|start|>{role}\nHello.<|end|>\n"
        f"<|start|>user\nBe brief.\n\nWhen do you open?<|end|>\n{ASSISTANT}"
    )
    for nobody in ([first], [OWN_SYSTEM]):
        with pytest.raises(ValueError, match=rf"cannot place .*roles: {nobody[0]['role']}\)"):
            tokenize_query(tokenizer, nobody, "Open at 10.")
    with pytest.raises(ValueError, match="a:1: no messages"):
        tokenize_query(tokenizer, [], "Open at 10.", source="a:1")


def test_without_a_chat_template():
    tokenizer = make_tokenizer(chat=False)
    query = tokenize_query(tokenizer, [USER], "Open at 10.")
    assert tokenizer.decode(teacher_ids(query)) == "<|bos|>Open at 10.\n\nWhen do you open?\n"
    assert query.before == [tokenizer.bos_token_id]
    assert tokenizer.decode(query.plain) == "<|bos|>When do you open?\n"


def make_sentencepiece_tokenizer(style: str):
    """Letters, some of them with a space before; texts begin with "▁" as ``style`` says."""
    letters = [chr(code) for code in range(33, 127)]
    tokens = ["▁", "\n", *letters, *(f"▁{letter}" for letter in "OWSw")]
    merges = [("▁", letter) for letter in "OWSw"]
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    if style == "prepend":
        core.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=style, split=False)
    bos, start, end = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=bos, eos_token=end, extra_special_tokens=[start]
    )


LLAMA_2 = (
    "{{ bos_token }}[INST] {% for message in messages %}"
    "{% if message['role'] == 'system' %}<<SYS>>\n{{ message['content'] }}\n<</SYS>>\n\n"
    "{% else %}{{ message['content'] }} [/INST]{% endif %}{% endfor %}"
)
MISTRAL = NO_SYSTEM_ROLE + "{{ bos_token }}[INST] {{ messages[0]['content'] }} [/INST]"
SPECIAL_AT_THE_SLOT = (
    "{% for message in messages %}<|start|>{{ message['content'] }}<|end|>{% endfor %}\n"
)


@pytest.mark.parametrize("style", ["prepend", "first", "always", "never"])
@pytest.mark.parametrize("context", ["Open at 10", "10 is when we open", "we do"])
@pytest.mark.parametrize(
    "template",
    [CHAT_TEMPLATE, LLAMA_2, MISTRAL, SPECIAL_AT_THE_SLOT, None],
    ids=["chatml", "llama2", "mistral", "special", "none"],
)
def test_the_pieces_are_those_of_the_whole_text(template, context, style):
    tokenizer = make_sentencepiece_tokenizer(style)
    tokenizer.chat_template = template
    query = tokenize_query(tokenizer, [USER], context)
    if template is None:
        whole = f"<|bos|>{context}\n\n{USER['content']}\n"
    elif template is MISTRAL:
        whole = f"<|bos|>[INST] {context}\n\n{USER['content']} [/INST]"
    else:
        messages = [{"role": "system", "content": context}, USER]
        whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert teacher_ids(query) == tokenizer(whole, add_special_tokens=False)["input_ids"]
    # The student's tokens do not depend on the context that they do without.
    other = tokenize_query(tokenizer, [USER], "x")
    assert (query.before, query.after) == (other.before, other.after)


def test_layouts():
    query = tokenize_query(make_tokenizer(), [USER], "Open at 10.")
    assert student_layout(query, "system") == (query.before, query.after)
    assert student_layout(query, "prefix") == ([], query.plain)
    assert teacher_ids(cut_context(query, 4)) == query.before + query.context[:4] + query.after
    with pytest.raises(ValueError, match="placement must be one of system, prefix: got 'middle'"):
        student_layout(query, "middle")


def test_an_answer_of_the_data_ends_with_the_end_token():
    tokenizer = make_tokenizer()
    bos, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert tokenizer.decode(tokenize_answer(tokenizer, "At 10.", [bos, end])) == "At 10.<|end|>"
    # The model may end its answers otherwise than its tokenizer says.
    assert tokenizer.decode(tokenize_answer(tokenizer, "At 10.", [bos])) == "At 10.<|bos|>"
    assert tokenizer.decode(tokenize_answer(tokenizer, "At 10.", [])) == "At 10."


@pytest.mark.parametrize(
    ("turn", "answer"),
    [
        ("{{ content }}<|start|>", "At 10.<|start|>"),
        ("{{ content }}<|start|><|end|>\n", "At 10.<|start|>"),
        ("{{ content }}\n", "At 10.<|end|>"),
        ("hm? {{ content | trim }}<|end|>", "hm? At 10.<|end|>"),
        ("{{ content }}", "At 10.<|end|>"),
        ("{{ raise_exception('no') }}", "At 10.<|end|>"),
    ],
    ids=str,
)
def test_an_answer_is_what_the_template_makes_of_a_turn(turn, answer):
    tokenizer = with_template()
    tokenizer.chat_template = (
        "{% for message in messages %}{% set content = message['content'] %}"
        "{% if message['role'] == 'assistant' %}<|start|>assistant\n" + turn + "{% else %}"
        "<|start|>{{ message['role'] }}\n{{ content }}<|end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    )
    model = make_model()
    model.generation_config.eos_token_id = None
    ends = end_ids(model, tokenizer)
    assert tokenizer.eos_token_id in ends
    ids = tokenize_answer(tokenizer, "At 10.", ends)
    assert ids[-1] in ends
    assert tokenizer.decode(ids) == answer


@pytest.mark.parametrize("style", ["prepend", "first", "always", "never"])
def test_an_answer_joins_what_stands_before_it(style):
    tokenizer = make_sentencepiece_tokenizer(style)
    tokenizer.chat_template = CHAT_TEMPLATE
    whole = tokenizer.apply_chat_template(
        [USER, {"role": "assistant", "content": "Only 10."}], tokenize=False
    )
    asked = tokenize_query(tokenizer, [USER], "").plain
    ids = tokenize_answer(tokenizer, "Only 10.", [tokenizer.eos_token_id])
    together = tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert asked + ids == together[: len(asked + ids)]


@pytest.mark.parametrize("context", [None, "", " \n"], ids=["none", "empty", "blank"])
def test_a_forgotten_context_is_refused(context):
    teacher = Teacher(make_model(), make_tokenizer(), show_progress=False)
    record = Record(messages=[USER], completion="At 10.", context=None, source="data.jsonl:3")
    with pytest.raises(ValueError, match=r"data\.jsonl:3: no field 'context', and no "):
        make_examples(teacher, make_tokenizer(), [record], context, record_hidden=False)
    own = dataclasses.replace(record, context="Open at 10.")
    (example,) = make_examples(teacher, make_tokenizer(), [own], context, record_hidden=False)
    assert make_tokenizer().decode(example.query.context) == "Open at 10."


class ByCode(PreTrainedTokenizerFast):
    """A tokenizer that renders chats by code, as the backend of mistral-common does."""

    joint = ""

    def apply_chat_template(self, conversation, tokenize=True, **options):
        text = "".join(f"<|start|>{m['role']}\n{m['content']}<|end|>\n" for m in conversation)
        text += ASSISTANT
        return self(text + self.joint, add_special_tokens=False) if tokenize else text


def test_a_tokenizer_is_asked_what_it_can_do():
    plain = with_template()
    by_code = ByCode(tokenizer_object=plain.backend_tokenizer)
    assert by_code.chat_template is None
    query = tokenize_query(by_code, [USER], "Open at 10.")
    assert by_code.decode(teacher_ids(query)).endswith(ASSISTANT)
    assert "<|start|>system" in by_code.decode(query.before)
    by_code.joint = "x"
    with pytest.raises(ValueError, match="ByCode renders chats by code of its own, and their text"):
        tokenize_query(by_code, [USER], "Open at 10.")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ({"start": "{{ messages[0]['content'] }}"}, "exactly once"),
        ({"start": "{{ raise_exception('never') }}"}, r"roles: user\).* TemplateError: never$"),
        ({"start": "{{ messages + 1 }}"}, r" It says: TypeError: can only concatenate list"),
        ({"start": "{{ 1 / 0 }}"}, r" It says: ZeroDivisionError: division by zero"),
        ({"start": "{{ messages[7].content }}"}, r" It says: UndefinedError: "),
    ],
    ids=["twice", "refused", "mistaken", "divided", "undefined"],
)
def test_a_template_without_a_place_for_the_context_is_named(template, message):
    with pytest.raises(ValueError, match=rf"data\.jsonl:7: the chat template .*{message}"):
        tokenize_query(with_template(**template), [USER], "Open at 10.", source="data.jsonl:7")
