"""Chat templates get transformers' variables and filters, and hostile templates fail."""

from __future__ import annotations

from typing import Any

import pytest

from modelpack_engine.errors import RequestError
from modelpack_engine.models.chat_template import ChatTemplate
from modelpack_engine.templates import budget
from modelpack_engine.templates.environment import Renderer, TemplateFailedError
from modelpack_server.conversation.prompt import wants_results_with_calls
from modelpack_server.tool_parsers.families import find_format
from modelpack_server.tool_parsers.history import takes_argument_strings

MESSAGES = [
    {"role": "system", "content": "Be <brief>."},
    {"role": "user", "content": "Hi, \u00fc!"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"b": 1, "a": [True, None]}}}]


def render(source: str, **variables: Any) -> str:
    return ChatTemplate(source).render({"messages": MESSAGES, "tools": None, **variables})


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for m in messages %}\n[{{ m.role }}]\n{% endfor %}\nend", "[system]\n[user]\nend"),
        (
            "{% for m in messages %}{{ loop.index0 ~ m['role'] ~ '.' }}{% endfor %}",
            "0system.1user.",
        ),
        ("{% for m in messages[1:] %}{{ loop.first }}{{ loop.length }}{% endfor %}", "True1"),
        (
            "{{ messages | tojson }}",
            '[{"role": "system", "content": "Be <brief>."}, {"role": "user", "content": "Hi, ü!"}]',
        ),
        ("{{ {'b': 1, 'a': ['<']} | tojson(indent=1) }}", '{\n "b": 1,\n "a": [\n  "<"\n ]\n}'),
        (
            "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
            "{% endfor %}{{ ns.n }}",
            "2",
        ),
        ("{% for m in messages %}{% if loop.last %}{% break %}{% endif %}x{% endfor %}", "x"),
        (
            "{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %}{% endfor %}",
            "systemuser",
        ),
        ("{{ messages | map(attribute='role') | join(', ') }}", "system, user"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "1"),
        (
            "{% macro f(n) %}{% if n %}{{ n }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(3) }}",
            "321",
        ),
        ("{{ strftime_now('%Y') | length }}", "4"),
        (
            "{{ missing ~ 'x' }}{{ missing is defined }}{{ enable_thinking | default(true) }}",
            "xFalseTrue",
        ),
        (
            "{{ '%s-%05d' | format('a', 7) }}{{ 'a,b'.split(',')[1] }}{{ ' x '.strip() }}",
            "a-00007bx",
        ),
        (
            "{{ 'abc'[::-1] }}{{ (1, 2)[0] }}{{ [1, 2, 3][-1] }}{{ range(3) | list }}",
            "cba13[0, 1, 2]",
        ),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}", "a1"),
        ("{{ 'ha' * 2 }}{{ 7 % 4 }}{{ 2 ** 8 }}{{ 7 // 2 }}", "haha32563"),
        ("{% filter upper %}a{{ 'b' }}{% endfilter %}{% set x %}c{% endset %}{{ x }}", "ABc"),
    ],
)
def test_what_templates_use(source: str, expected: str) -> None:
    assert render(source) == expected


def test_another_template_for_tools() -> None:
    template = ChatTemplate("plain", tool_use="with {{ tools | length }}")
    assert template.render({"messages": MESSAGES, "tools": None}) == "plain"
    assert template.render({"messages": MESSAGES, "tools": TOOLS}) == "with 1"


def test_long_conversations_fit() -> None:
    messages = [{"role": "user", "content": "word " * 200}] * 2000
    source = "{% for m in messages %}{{ '<' + m.role + '>' + m.content | trim }}\n{% endfor %}"
    assert len(render(source, messages=messages)) > 2_000_000


BIG = "{% set s = 'a' * 100000 %}"
GROW = "{% set ns = namespace(s=START) %}{% for i in range(100) %}{% set ns.s = STEP %}{% endfor %}"
MISUSE = {
    "loops": "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
    "range": "{% for i in range(10000001) %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "exponential macro": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}"
    "{% endmacro %}{{ f(60) }}",
    "recursive loop": "{% for x in [[[1]]] recursive %}{{ loop([x, x]) }}{% endfor %}",
    "repeated text": "{{ 'a' * 10000000000 }}",
    "doubled by ~": GROW.replace("START", "'ab'").replace("STEP", "ns.s ~ ns.s"),
    "doubled by +": GROW.replace("START", "'ab'").replace("STEP", "ns.s + ns.s"),
    "doubled by join": GROW.replace("START", "'ab'").replace("STEP", "[ns.s, ns.s] | join"),
    "nested lists": GROW.replace("START", "[1]").replace("STEP", "[ns.s, ns.s]") + "{{ ns.s }}",
    "nested dicts": GROW.replace("START", "[1]").replace("STEP", "{'a': ns.s, 'b': ns.s}")
    + "{{ ns.s | tojson }}",
    "squared number": GROW.replace("START", "99").replace("STEP", "ns.s * ns.s"),
    "power": "{{ 9 ** (9 ** 9) }}",
    "width of format": "{{ '%0999999999d' % 1 }}",
    "width of filter": "{{ '%0999999999d' | format(1) }}",
    "width of method": "{{ '{:>999999999}'.format(1) }}",
    "width as argument": "{% for i in range(99) %}{{ '{:>{w}}'.format(1, w=8000000) }}{% endfor %}",
    "ljust": "{{ 'a'.ljust(1000000000) }}",
    "zfill": "{% for i in range(999) %}{{ '1'.zfill(8000000) | length }}{% endfor %}",
    "replace filter": BIG + "{{ s | replace('a', s) }}",
    "replace method": BIG + "{{ s.replace('', s) }}",
    "join filter": BIG + "{{ range(10000) | join(s) }}",
    "join method": BIG + "{{ s.join(['a'] * 10000) }}",
    "indent": "{% set s = '\\n' * 100000 %}{{ s | indent(1000) }}",
    "expandtabs": "{% set s = '\\t' * 100000 %}{{ s.expandtabs(1000) }}",
    "translate": "{{ 'aaaa'.translate({97: 'b' * 1000000}) }}",
    "captured text": "{% set x %}{% for i in range(9999) %}{% for j in range(9999) %}"
    + "a" * 9999
    + "{% endfor %}{% endfor %}{% endset %}",
    "slices": "{% set s = 'a' * 8000000 %}{% for i in range(999) %}{% set x = s[1:] %}{% endfor %}",
    "kept values": "{% set ns = namespace(l=[]) %}{% for i in range(9999) %}"
    "{% set ns.l = ns.l + [(i | string) * 100000] %}{% endfor %}",
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "attributes by format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "changed messages": "{{ messages.append(1) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "our own charges": "{{ environment.charge(-10) }}",
    "syntax": "{% for %}",
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "too many blocks": "{% for i in [1] %}" * 40 + "{% endfor %}" * 40,
    "too long": "a" * 600_000,
    "type": "{{ 'a' + 1 }}",
    "undefined": "{{ nothing.at.all }}",
    "division": "{{ 1 / 0 }}",
}


@pytest.mark.parametrize("source", MISUSE.values(), ids=MISUSE)
def test_misuse_fails_the_request(source: str) -> None:
    with pytest.raises(RequestError, match="the model's chat template failed: ") as caught:
        render(source)
    assert caught.value.param == "messages"
    assert len(str(caught.value)) < 700


def test_a_template_says_what_it_wants() -> None:
    with pytest.raises(RequestError, match=r"failed: roles must alternate$"):
        render("{{ raise_exception('roles must alternate') }}")


def test_attributes_are_hidden_from_filters() -> None:
    assert render("{{ messages | attr('__class__') }}") == ""
    assert messages_are_unchanged()


def messages_are_unchanged() -> bool:
    return [message["role"] for message in MESSAGES] == ["system", "user"]


def test_budgets_are_per_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "MAX_STEPS", 1000)
    renderer = Renderer()
    source = "{% for i in range(n) %}{% endfor %}"
    for _ in range(4):
        assert renderer.render(source, {"n": 900}) == ""
    with pytest.raises(TemplateFailedError, match="more than 1000 steps"):
        renderer.render(source, {"n": 1001})


def test_a_failed_template_can_be_used_again() -> None:
    template = ChatTemplate("{{ 'x' * n }}")
    with pytest.raises(RequestError):
        template.render({"n": 10**9})
    assert template.render({"n": 3}) == "xxx"


@pytest.mark.parametrize(
    "piece", ["a.", "[", "'", "arguments", "arguments ", "{{ ", "+ ", " ", "\n", "role ", '"', "[{",
              "[TOOL_CALLS]", "[TOOL_CALLS]'", "[TOOL_CALLS] ", "name"],
)  # fmt: skip
def test_what_is_read_from_a_templates_text_takes_linear_time(piece: str) -> None:
    """The server searches templates itself; in quadratic time this would take hours."""
    text = "tool_responses" + piece * (500_000 // len(piece))
    takes_argument_strings.__wrapped__(text)
    wants_results_with_calls.__wrapped__(text)
    find_format(text)
