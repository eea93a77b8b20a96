"""What templates do with content is found out for every role, and for every way in which one may use a string."""

from __future__ import annotations

from typing import Any

import pytest

from tests.chat.test_renderer import image, image_token_front
from tests.inputs.front import renderer_of

LOOP = (
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}"
    "{% elif p.type == 'image' %}<image>{% endif %}{% endfor %}{% endif %}"
)
WAYS = {
    "printed": "{{ m.content }}",
    "added to": "{{ 'x' + m.content }}",
    "added": "{{ m.content + 'x' }}",
    "concatenated": "{{ m.content ~ 'x' }}",
    "trimmed": "{{ m.content | trim }}",
    "in capitals": "{{ m.content | upper }}",
    "titled": "{{ m.content | title }}",
    "joined": "{{ m.content | join }}",
    "joined by": "{{ m.content | join('-') }}",
    "replaced": "{{ m.content | replace('a', 'b') }}",
    "a string": "{{ m.content | string }}",
    "escaped": "{{ m.content | e }}",
    "as JSON": "{{ m.content | tojson }}",
    "a slice": "{{ m.content[:9999] }}",
    "first and rest": "{{ m.content[0] ~ m.content[1:] }}",
    "stripped": "{{ m.content.strip() }}",
    "split": "{{ m.content.split('|')[-1] }}",
    "searched": "{% if '</think>' in m.content %}t{% endif %}{{ m.content }}",
    "by characters": "{% for c in m.content %}{{ c }}{% endfor %}",
    "in a list": "{{ [m.content] | join(', ') }}",
    "formatted": "{{ '%s!' % m.content }}",
    "formatted anew": "{{ '{}!'.format(m.content) }}",
    "by a macro": "{% macro show(c) %}[{{ c }}]{% endmacro %}{{ show(m.content) }}",
    "set before": "{% set c = m.content %}{% if c is not none %}{{ c | trim }}{% endif %}",
    "if iterable": "{% if m.content is iterable %}{{ m.content }}{% endif %}",
    "if not mapping": "{% if m.content is mapping %}M{% else %}{{ m.content }}{% endif %}",
    "only the first part": "{{ m.content if m.content is string else m.content[0].text }}",
    "only strings": "{% if m.content is string %}{{ m.content }}{% endif %}",
    "both": LOOP,
    "only parts": "{% for p in m.content %}{{ p.text }}{% endfor %}",
}
ROLES = ("system", "developer", "user", "assistant", "tool", "critic")


def template_of(role: str, way: str) -> str:
    """A template that uses the content of one role's messages in some way, and that of all others in every way."""
    return (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == '"
        + role
        + "' %}"
        + WAYS[way]
        + "{% else %}"
        + LOOP
        + "{% endif %}{% endfor %}"
    )


def conversation(role: str, content: Any) -> list[dict[str, Any]]:
    message = {"role": role, "content": content}
    call = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    match role:
        case "user":
            return [message]
        case "assistant":
            return [{"role": "user", "content": "u"}, message, {"role": "user", "content": "v"}]
        case "tool":
            calling = {"role": "assistant", "content": "", "tool_calls": [call]}
            return [{"role": "user", "content": "u"}, calling, {**message, "tool_call_id": "call00000"}]
        case _:
            return [message, {"role": "user", "content": "u"}]


def part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("way", WAYS)
def test_parts_and_strings_are_the_same_prompt(role: str, way: str) -> None:
    """Python's repr of a list was in the prompt, where a template looped over the user's parts and took the system's
    message for a string.
    """
    renderer = renderer_of(template="{# tools #}" + template_of(role, way) + "{% if tools %}{% endif %}")
    texts = ("Be brief, please.", 'It\'s: "fine"')
    for text in texts:
        string, parts = (renderer.render(conversation(role, content))["prompt"] for content in (text, [part(text)]))
        assert string == parts
        assert ("brief" if "brief" in text else "fine") in string.lower().replace("-", "")
    both = renderer.render(conversation(role, [part(text) for text in texts]))["prompt"].lower()
    assert "'type'" not in both
    assert '"type"' not in both
    both = both.replace("-", "")
    assert both.index("brief") < both.index("fine")


@pytest.mark.parametrize("way", ["printed", "added", "trimmed", "joined", "a slice", "searched", "stripped"])
def test_a_template_may_take_another_form_in_another_place(way: str) -> None:
    """The first message by itself, all others in a loop; where there are tools; beside calls."""
    first = (
        "{% set m = messages[0] %}{% if m.role == 'system' %}" + WAYS[way] + "{% endif %}{% for m in messages %}"
        "{% if not loop.first or m.role != 'system' %}" + LOOP + "{% endif %}{% endfor %}"
    )
    told = (
        "{% if tools %}T{% set m = messages[0] %}" + WAYS[way] + "{% endif %}{% for m in messages %}{% if not tools or"
        " not loop.first %}" + LOOP + "{% endif %}{% endfor %}"
    )
    beside = (
        "{% if tools %}{% endif %}{% for m in messages %}{% if m.tool_calls %}"
        + WAYS[way]
        + "{% else %}"
        + LOOP
        + "{% endif %}{% endfor %}"
    )
    tools = [{"type": "function", "function": {"name": "f"}}]
    call = {"id": "call00000", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    user = {"role": "user", "content": "u"}
    for template, message, options in (
        (first, {"role": "system"}, {}),
        (told, {"role": "system"}, {"tools": tools}),
        (beside, {"role": "assistant", "tool_calls": [call]}, {}),
    ):
        renderer = renderer_of(template=template)
        rendered = []
        for content in ("Be brief.", [part("Be brief.")]):
            messages = [user, {**message, "content": content}][:: -1 if message["role"] == "system" else 1]
            rendered.append(renderer.render(messages, **options)["prompt"])
        assert rendered[0] == rendered[1]
        assert "Be brief." in rendered[0]


@pytest.mark.parametrize("role", ROLES)
def test_media_of_a_role_that_takes_strings_stand_as_text(role: str) -> None:
    """The user's pictures are placed by the template, those of another role by the model's own placeholder."""
    renderer = renderer_of(image_token_front(), template_of(role, "trimmed") + "{% if tools %}{% endif %}")
    prompt = renderer.render(conversation(role, [part("Look: "), image()]))
    assert prompt["prompt"].count("<image>") == 1
    assert "'type'" not in prompt["prompt"]
    assert len(prompt["multi_modal_data"]["image"]) == 1


def test_the_developer_s_messages_are_the_system_s_where_a_template_knows_no_other() -> None:
    """They were left out of the prompt without a word."""
    shown = "<{{ m.role }}>{{ m.content }}"
    known = "{% for m in messages %}{% if m.role in ['system', 'user'] %}" + shown + "{% endif %}{% endfor %}"
    user = {"role": "user", "content": "u"}
    for content in ("Be brief.", [part("Be brief.")]):
        messages = [{"role": "developer", "content": content}, user]
        assert renderer_of(template=known).render(messages)["prompt"] == "<system>Be brief.<user>u"
        own = known.replace("'system', ", "'system', 'developer', ")
        assert renderer_of(template=own).render(messages)["prompt"] == "<developer>Be brief.<user>u"
