import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from cluster.errors import InvalidRequest, ModelError
from router.text import Text

CONVERSATIONS = [
    [{"role": "user", "content": "hello"}],
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": "  hello <b>&amp;</b> 你好 🙂 "}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c\n\nd"},
    ],
]
TEMPLATES = {
    "whitespace": "{% for m in messages %}\n   {% if m.role == 'user' %}\n {{ m.content }}\n {% endif %}\n{% endfor %}",
    "json": "{% for m in messages %}{{ m | tojson }}{{ m | tojson(indent=2) }}{% endfor %}",
    "loop controls": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}|{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "names": "{{ bos_token }}{{ eos_token }}{{ pad_token is defined }}{{ tools is none }}{{ documents is none }}",
    "date": "{{ strftime_now('%Y') }}",
}


@pytest.fixture(scope="module")
def text(model_directory: Path) -> Text:
    return Text.load(model_directory)


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_chat_equals_transformers(text: Text, model_directory: Path, messages: list[dict[str, str]]) -> None:
    reference = AutoTokenizer.from_pretrained(model_directory)
    assert text.render(messages) == reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids: Any = reference.apply_chat_template(messages, add_generation_prompt=True)
    assert list(asyncio.run(text.encode_chat(messages))) == ids["input_ids"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(model_directory: Path, tmp_path: Path, name: str) -> None:
    for file in model_directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "chat_template.jinja").write_text(TEMPLATES[name])
    reference = AutoTokenizer.from_pretrained(tmp_path)
    for messages in CONVERSATIONS:
        expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert Text.load(tmp_path).render(messages) == expected


def test_special_tokens_are_added_once(text: Text, model_directory: Path) -> None:
    bos = 0
    plain = asyncio.run(text.encode("hello world"))
    assert plain[0] == bos
    assert list(plain) == AutoTokenizer.from_pretrained(model_directory)("hello world")["input_ids"]
    chat = asyncio.run(text.encode_chat([{"role": "user", "content": "hello"}]))
    assert chat.count(bos) == 1  # the template's own
    assert asyncio.run(text.encode_chat([{"role": "system", "content": "hello"}])).count(bos) == 0


def test_a_named_default_template_is_found(model_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((model_directory / "tokenizer.json").read_bytes())
    templates = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ messages[0].content }}"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    assert Text.load(tmp_path).render([{"role": "user", "content": "yes"}]) == "yes"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].nothing.at_all }}",
        "{{ messages.append(1) }}",  # the sandbox forbids changing what it was given
        "{{ ''.__class__.__mro__ }}",
        "{{ 1 + messages[0].content }}",
    ],
)
def test_a_template_that_refuses_is_the_clients_error(model_directory: Path, tmp_path: Path, template: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes((model_directory / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_text(template)
    text = Text.load(tmp_path)
    with pytest.raises(InvalidRequest) as error:
        asyncio.run(text.encode_chat([{"role": "user", "content": "x"}]))
    assert error.value.param == "messages"


def test_no_template(model_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((model_directory / "tokenizer.json").read_bytes())
    with pytest.raises(InvalidRequest, match="/v1/completions"):
        asyncio.run(Text.load(tmp_path).encode_chat([{"role": "user", "content": "x"}]))


def test_broken_directories(model_directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        Text.load(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((model_directory / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(ModelError, match="chat template is broken at line 1"):
        Text.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json"):
        Text.load(tmp_path)
