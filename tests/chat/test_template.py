"""Chat templates: where they are found, what they are asked, and what they may not do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sensorium.chat.renderer import ChatRenderer
from sensorium.chat.template_probe import MessageKind, TemplateProbe
from sensorium.errors import ConfigError, InvalidRequestError, UnsupportedFeatureError
from tests.helpers.checkpoints import make_checkpoint, make_tokenizer
from tests.helpers.configs import make_model_config
from tests.inputs.front import TEMPLATES, Front, new_model, renderer_of

USER = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("template", "strings", "parts", "places"),
    [
        (TEMPLATES["strings"], True, False, {}),
        (TEMPLATES["parts"], False, True, {"image": "<image>"}),
        (TEMPLATES["images first"], True, True, {"image": "<image>\n"}),
        ("{{ messages[0]['content'] | tojson }}", True, False, {}),
        ("{{ messages[0]['content'] + '!' }}", True, False, {}),
        ("{{ raise_exception('never') }}", False, False, {}),
        (
            (
                "{% for p in messages[-1]['content'] %}{{ p.get('text', '') }}{% if 'image_url' in p %}I{% endif %}"
                "{% endfor %}"
            ),
            False,
            True,
            {"image": "I"},
        ),
        (
            (
                "{% if messages[0]['role'] != 'system' %}{{ raise_exception('system first') }}{% endif %}"
                "{{ messages[1]['content'] }}"
            ),
            True,
            False,
            {},
        ),
    ],
)
def test_a_template_s_format_is_found_by_trying_it(
    template: str, strings: bool, parts: bool, places: dict[str, str]
) -> None:
    found = TemplateProbe(make_tokenizer(), ["image"]).format_of(template, MessageKind("user"))
    assert (found.takes_strings, found.takes_parts, found.placeholders) == (strings, parts, places)


def test_strings_become_parts_where_a_template_would_lose_them() -> None:
    prompt = renderer_of(template=TEMPLATES["parts"]).render([{"role": "user", "content": "hello"}])
    assert prompt["prompt"] == "[user]hello[assistant]"


@pytest.mark.parametrize("where", ["json", "jinja", "path"])
def test_where_a_template_is_found(where: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    shutil.copytree(make_checkpoint("llava"), path)
    for old in path.glob("chat_template*"):
        old.unlink()
    if where == "json":
        (path / "chat_template.json").write_text(json.dumps({"chat_template": "from json"}))
    elif where == "jinja":
        (path / "chat_template.jinja").write_text("from jinja")
    else:
        (tmp_path / "mine.jinja").write_text("from path")
    renderer = renderer_of(Front(model=path), str(tmp_path / "mine.jinja") if where == "path" else None)
    assert renderer.render(USER)["prompt"] == f"from {where}"


def test_no_template_is_the_request_s_error_and_a_wrong_path_the_operator_s(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="the model has none for this request"):
        renderer_of(template=None).render(USER)
    with pytest.raises(ConfigError, match="expected a template or the path of a file"):
        renderer_of(template="no/such/file.jinja")
    (tmp_path / "chat_template.json").write_text("{")
    with pytest.raises(ConfigError, match="no JSON"):
        ChatRenderer(make_model_config(new_model(), model=tmp_path), make_tokenizer())


def test_named_templates() -> None:
    front = Front()
    assert front.preprocessor.encoder is not None
    templates = {"default": "default", "tool_use": "tools: {{ tools | length }}", "other": "other"}
    front.preprocessor.encoder.tokenizer.chat_template = templates
    renderer = renderer_of(front, None)
    assert renderer.render(USER)["prompt"] == "default"
    assert renderer.render(USER, tools=[{"type": "function"}])["prompt"] == "tools: 1"
    assert renderer.render(USER, chat_template="other")["prompt"] == "other"


def test_templates_of_requests_are_refused_unless_trusted() -> None:
    with pytest.raises(UnsupportedFeatureError, match="trust_request_chat_template"):
        renderer_of().render(USER, chat_template="{{ 7 * 7 }}")
    assert renderer_of(trust_request_chat_template=True).render(USER, chat_template="{{ 7 * 7 }}")["prompt"] == "49"


@pytest.mark.parametrize(
    "template",
    ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ cycler.__init__.__globals__ }}", "{% for %}"],
)
def test_templates_run_in_a_sandbox(template: str) -> None:
    with pytest.raises(InvalidRequestError, match="the model's chat template"):
        renderer_of(trust_request_chat_template=True).render(USER, chat_template=template)


def test_a_template_s_own_complaint_reaches_the_caller() -> None:
    with pytest.raises(InvalidRequestError, match="roles must alternate"):
        renderer_of(template="{{ raise_exception('roles must alternate') }}").render(USER)


@pytest.mark.parametrize("name", ["messages", "tokenize", "chat_template", "tools"])
def test_variables_may_not_choose_what_is_rendered(name: str) -> None:
    # Published as CVE-2025-61620 and CVE-2025-62426: templates and options of the renderer came from clients.
    with pytest.raises(InvalidRequestError, match="chat_template_kwargs"):
        renderer_of().render(USER, chat_template_kwargs={name: True})


def test_variables_tools_and_other_fields_reach_the_template() -> None:
    template = (
        "{{ thinking }} {{ tools[0]['function']['name'] }} {{ messages[1]['name'] }} "
        "{{ messages[0]['tool_calls'][0]['function']['arguments']['city'] }} {{ 'content' in messages[0] }}"
    )
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages: list[dict[str, Any]] = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "sunny", "name": "weather"},
    ]
    tools = [{"type": "function", "function": {"name": "weather"}}]
    prompt = renderer_of(template=template).render(messages, tools=tools, chat_template_kwargs={"thinking": "yes"})
    assert prompt["prompt"] == "yes weather weather Rome True"
