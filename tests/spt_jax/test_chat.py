from __future__ import annotations

import datetime
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from spt_jax.chat import ChatTemplate, encode_messages

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/chat.json").read_text(encoding="utf-8"))
TALK = GOLDEN["conversations"]["talk"]
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>")
SPECIAL += ("<|end_header_id|>", "<|eot_id|>")


def template(name):
    return ChatTemplate(GOLDEN["templates"][name]["source"], GOLDEN["tokens"])


def trained(tokenizer):
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = [message["content"] for message in TALK] + [
        "user assistant system Be of help. Assistant: "
    ]
    tokenizer.train_from_iterator(texts * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return tokenizer


@pytest.fixture(scope="module")
def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return trained(tokenizer)


@pytest.fixture(scope="module")
def metaspace():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    return trained(tokenizer)


@pytest.mark.parametrize("name", list(GOLDEN["templates"]))
def test_renders_as_transformers_does(name):
    for case in GOLDEN["templates"][name]["cases"]:
        messages = GOLDEN["conversations"][case["conversation"]]
        if case["text"] is None:
            with pytest.raises(ValueError, match=r"roles system, user, assistant: Conv.*alternate"):
                template(name).render(messages, case["add_generation_prompt"])
        else:
            assert template(name).render(messages, case["add_generation_prompt"]) == case["text"]


REPLIES = {
    "llama3": ["4.<|eot_id|>", "De rien<|eot_id|>"],
    "chatml": ["4.\n<|im_end|>\n", "De rien<|im_end|>\n"],
    "mistral": [" 4.\n</s>", " De rien</s>"],
}


@pytest.mark.parametrize("name", list(REPLIES))
def test_only_replies_are_predicted(byte_level, name):
    (found,) = encode_messages(TALK, byte_level, template(name))
    text = template(name).render(TALK)
    assert byte_level.decode(found.ids.tolist(), skip_special_tokens=False) == text
    edges = np.flatnonzero(np.diff(found.predicted, prepend=False, append=False))
    replies = [
        byte_level.decode(found.ids[a:b].tolist(), skip_special_tokens=False)
        for a, b in edges.reshape(-1, 2)
    ]
    assert replies == REPLIES[name]
    if text.startswith("<s>"):
        assert found.ids[:2].tolist() != [0, 0]


def test_replies_of_a_tokenizer_with_metaspace(metaspace):
    (found,) = encode_messages(TALK[2:], metaspace, template("mistral"))
    chosen = metaspace.decode(found.ids[found.predicted].tolist(), skip_special_tokens=False)
    assert chosen.replace(" ", "") == "Derien</s>"


def test_a_template_that_rewrites_earlier_replies_gives_a_document_each(byte_level):
    found = encode_messages(TALK, byte_level, template("qwen3"))
    texts = [byte_level.decode(d.ids.tolist(), skip_special_tokens=False) for d in found]
    assert texts == [template("qwen3").render(TALK[:n]) for n in (2, 4)]
    for document, reply in zip(found, ("4.\n", "De rien"), strict=True):
        predicted = document.ids[document.predicted].tolist()
        wanted = f"<think>\n\n</think>\n\n{reply}<|im_end|>\n"
        assert byte_level.decode(predicted, skip_special_tokens=False) == wanted


def test_limits_of_the_tokenizer_are_not_used(byte_level):
    (expected,) = encode_messages(TALK, byte_level, template("chatml"))
    limited = Tokenizer.from_str(byte_level.to_str())
    limited.enable_truncation(4)
    limited.enable_padding(length=64)
    (found,) = encode_messages(TALK, limited, template("chatml"))
    np.testing.assert_array_equal(found.ids, expected.ids)
    assert limited.truncation is not None


def test_conversations_that_cannot_be_learned_from(byte_level):
    with pytest.raises(ValueError, match="no message by the assistant"):
        encode_messages(TALK[:1], byte_level, template("chatml"))
    thinking = ChatTemplate(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: <think>{% endif %}"
    )
    with pytest.raises(ValueError, match=r"reply 1 cannot be told .*prompt '.*assistant: <think>'"):
        encode_messages(TALK, byte_level, thinking)


TOOLS = [{"type": "function", "function": {"name": "sum", "parameters": {}}}]


def test_tools_reach_the_template(byte_level):
    source = (
        "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}{{ m.role }}: "
        "{{ m.content or m.tool_calls[0].function.name }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {{ start }}{% endif %}"
    )
    known = ChatTemplate(source)
    called = {"role": "assistant", "tool_calls": [{"function": {"name": "sum"}}]}
    messages = [TALK[0], called]
    rendered = known.render(messages, tools=TOOLS)
    assert rendered.startswith(json.dumps(TOOLS) + "\nuser: ")
    (document,) = encode_messages(messages, byte_level, known, tools=TOOLS)
    assert byte_level.decode(document.ids.tolist(), skip_special_tokens=False) == rendered
    predicted = document.ids[document.predicted].tolist()
    assert byte_level.decode(predicted, skip_special_tokens=False) == "sum</s>"
    with pytest.raises(ValueError, match="the chat template reads no tools, so the model would"):
        encode_messages(messages, byte_level, ChatTemplate.plain(eos_token="</s>"), tools=TOOLS)
    with pytest.raises(ValueError, match="reads no enable_thinking"):
        known.render(messages, enable_thinking=False)
    assert known.render([], True, start="<think>") == "assistant: <think>"


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be."}]])
def test_a_reply_before_any_question_is_named_where_the_template_needs_one(byte_level, system):
    greeted = [*system, *TALK[1:]]
    needs_a_user = ChatTemplate(
        "{% if not messages | selectattr('role', 'equalto', 'user') | list %}"
        "{{ raise_exception('No user query') }}{% endif %}"
        "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    refused = rf"reply {len(system)} comes before any message of the user"
    with pytest.raises(ValueError, match=refused):
        encode_messages(greeted, byte_level, needs_a_user)
    if not system:
        with pytest.raises(ValueError, match=refused):  # its own system message comes in between
            encode_messages(greeted, byte_level, template("chatml"))
    (document,) = encode_messages(greeted, byte_level, ChatTemplate.plain(eos_token="</s>"))
    predicted = byte_level.decode(document.ids[document.predicted].tolist())
    assert "4." in predicted
    assert "De rien" in predicted


def test_plain():
    plain = ChatTemplate.plain(eos_token="</s>", bos_token="<s>")
    messages = [{"role": "system", "content": "Be brief.\n"}, *TALK[:2]]
    asked = "<s>System: Be brief.\nUser: What is <b>2 + 2</b>?\n"
    assert plain.render(messages[:2], add_generation_prompt=True) == asked + "Assistant:"
    assert plain.render(messages) == asked + "Assistant: 4.</s>\n"


def write(directory, config=None, template=None):
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    return directory


def test_loads_from_a_model_directory(tmp_path):
    config = {
        "chat_template": "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ messages[0].role }}",
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "lstrip": False},
        "pad_token": None,
        "add_bos_token": True,
    }
    loaded = ChatTemplate.load(write(tmp_path, config))
    assert loaded.render([{"role": "user", "content": "a"}]) == "<s>|</s>||user"
    sources = [{"name": "tool_use", "template": "b"}, {"name": "default", "template": "c"}]
    assert ChatTemplate.load(write(tmp_path, {"chat_template": sources})).render([]) == "c"
    assert ChatTemplate.load(write(tmp_path, template="d")).render([]) == "d"


def test_the_older_file_of_a_template_comes_last(tmp_path):
    older = tmp_path / "chat_template.json"
    older.write_text(json.dumps({"chat_template": "{{ bos_token }}json"}))
    assert ChatTemplate.load(write(tmp_path, {"bos_token": "<s>"})).render([]) == "<s>json"
    assert ChatTemplate.load(write(tmp_path, {"chat_template": "config"})).render([]) == "config"
    assert ChatTemplate.load(write(tmp_path, template="jinja")).render([]) == "jinja"


def test_an_older_file_with_several_templates_or_none(tmp_path):
    older = tmp_path / "chat_template.json"
    older.write_text(json.dumps({"chat_template": {"default": "a", "rag": "b"}}))
    assert ChatTemplate.load(tmp_path).render([]) == "a"
    older.write_text(json.dumps({}))
    with pytest.raises(ValueError, match=r"no chat template \(.*chat_template\.json or a GGUF"):
        ChatTemplate.load(tmp_path)
    older.write_text("[]")
    with pytest.raises(ValueError, match=r"chat_template\.json holds a JSON list, not an object"):
        ChatTemplate.load(tmp_path)


def add_template(directory, name, source):
    folder = directory / "additional_chat_templates"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jinja").write_text(source)
    return directory


@pytest.mark.parametrize("file", [True, False])
def test_templates_that_are_not_read_are_told(tmp_path, caplog, file):
    caplog.set_level(logging.INFO, "spt_jax")

    def loaded(*names):
        if file:
            for name in names:
                add_template(tmp_path, name, "b")
            return ChatTemplate.load(write(tmp_path, template="a"))
        sources = [{"name": name, "template": "b"} for name in names]
        sources.append({"name": "default", "template": "a"})
        return ChatTemplate.load(write(tmp_path, {"chat_template": sources}))

    assert loaded().render([]) == "a"
    assert not caplog.messages
    assert loaded("rag").render([]) == "a"
    assert loaded("rag", "tool_use").render([]) == "a"
    assert [record.levelno for record in caplog.records] == [logging.INFO, logging.WARNING]
    for line, said in zip(caplog.messages, ("rag are not read;", "rag, tool_use are"), strict=True):
        assert said in line
    assert "transformers takes tool_use where there are tools" in caplog.messages[1]


def test_templates_beside_none_that_is_read(tmp_path):
    with pytest.raises(ValueError, match='none named "default": tool_use; make a ChatTemplate of'):
        ChatTemplate.load(add_template(tmp_path, "tool_use", "b"))


def test_special_tokens_of_the_map_beside(tmp_path):
    source = "{{ bos_token }}|{{ eos_token }}"
    config = {"chat_template": source, "bos_token": "<s>", "eos_token": "</s>"}
    ends = {"eos_token": {"content": "<|im_end|>", "lstrip": False}}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(ends))
    assert ChatTemplate.load(write(tmp_path, config)).render([]) == "<s>|<|im_end|>"
    newer = write(tmp_path, config | {"added_tokens_decoder": {}})
    assert ChatTemplate.load(newer).render([]) == "<s>|</s>"


def test_templates_that_cannot_be_loaded(tmp_path):
    with pytest.raises(ValueError, match=r"has no chat template .* ChatTemplate\.plain"):
        ChatTemplate.load(tmp_path)
    sources = [{"name": "tool_use", "template": "b"}]
    with pytest.raises(ValueError, match='none named "default": tool_use'):
        ChatTemplate.load(write(tmp_path, {"chat_template": sources}))
    with pytest.raises(ValueError, match=r"tokenizer_config\.json holds a JSON list, not an obj"):
        ChatTemplate.load(write(tmp_path, []))
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not valid JSON"):
        ChatTemplate.load(tmp_path)
    with pytest.raises(ValueError, match=r"the chat template has an error: .*'endfor'"):
        ChatTemplate("{% for m in messages %}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ strftime_now.__globals__['__builtins__'] }}",
    ],
)
def test_templates_cannot_leave_the_sandbox(source):
    with pytest.raises(ValueError, match="the chat template refuses"):
        ChatTemplate(source).render(TALK)


def test_the_date_can_be_fixed():
    source = "{{ strftime_now('%d %b %Y') }}"
    fixed = ChatTemplate(source, now=datetime.datetime(2024, 7, 26))
    assert fixed.render([]) == "26 Jul 2024"
    assert ChatTemplate(source).render([]) == datetime.datetime.now().strftime("%d %b %Y")
