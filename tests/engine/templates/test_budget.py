# ruff: noqa: E501 (templates are clearer in one line)
"""The budget of a template works without limits of the operating system."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modelpack_engine.templates import budget
from modelpack_engine.templates.budget import Budget
from modelpack_engine.templates.environment import Renderer, TemplateFailedError
from modelpack_engine.worker.process import WorkerProcess, encoded
from tests.engine.templates.hostile import FAST, SLOW

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
_MIB = 1024 * 1024


@pytest.fixture
def unlimited() -> Iterator[WorkerProcess]:
    """A worker whose memory the system does not limit."""
    worker = WorkerProcess(64 * 1024 * _MIB)
    yield worker
    worker.close()


def peak(worker: WorkerProcess) -> int:
    """Return the peak memory of a process in bytes, on Linux."""
    lines = Path(f"/proc/{worker.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def render(worker: WorkerProcess, source: str) -> dict[str, Any]:
    job = {
        "kind": "render", "source": source, "seconds": 60,
        "variables": {"messages": MESSAGES, "tools": None},
    }  # fmt: skip
    answer: dict[str, Any] = json.loads(worker.call(encoded(job), 60))
    return answer


def check_all(worker: WorkerProcess, sources: dict[str, str]) -> None:
    for name, source in sources.items():
        answer = render(worker, source)
        assert "error" in answer, name
        if sys.platform == "linux":
            assert peak(worker) < 400 * _MIB, name
    assert render(worker, "{{ messages[0].content }}")["value"] == "hi"


@pytest.mark.long
def test_hostile_templates_are_refused_in_little_memory(unlimited: WorkerProcess) -> None:
    check_all(unlimited, FAST)


@pytest.mark.long
def test_slow_hostile_templates_are_refused_in_little_memory(unlimited: WorkerProcess) -> None:
    check_all(unlimited, SLOW)


def test_a_filter_is_charged_for_each_item(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "MAX_ITEMS", 1000)
    for filter_ in ("map('string') | list", "select", "batch(1)", "join"):
        source = "{{ range(n) | FILTER | length }}".replace("FILTER", filter_)
        assert Renderer().render(source, {"n": 900})
        with pytest.raises(TemplateFailedError, match="larger than"):
            Renderer().render(source, {"n": 1002})


def test_shared_lists_count_as_often_as_they_are_held() -> None:
    inner = ["x" * 1000] * 100
    made = Budget()
    once = made.size_of([inner])
    assert 9.5 * once < made.size_of([inner] * 10) < 10.5 * once
    assert made.size_of({"a": [inner] * 5, "b": ([inner], [inner])}) > 6.5 * once


def test_a_namespace_does_not_write_what_it_holds() -> None:
    source = (
        "{% set ns = namespace(n=1) %}{% for i in range(40) %}"
        "{% set ns.n = namespace(a=ns.n, b=ns.n) %}{% endfor %}{{ ns.n }}{{ [ns.n] }}"
    )
    assert Renderer().render(source, {}) == "<Namespace>[<Namespace>]"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ 'a b'.split() }}{{ 'a,b,c'.split(',', 1)[1] }}{{ 'a\nb'.splitlines()[1] }}", "['a', 'b']b,cb"),
        ("{{ 'ab'.replace('a', 'x') }}{{ 'aab' | replace('a', 'x', 1) }}", "xbxab"),
        ("{{ 'a\n\nb' | indent(2) }}|{{ 'a' | indent(2, true) }}", "a\n\n  b|  a"),
        ("{{ [1, 2.5] | sum }}{{ messages | sum(attribute='n', start=1) }}", "3.54"),
        ("{{ '<a>' | e }}{{ '<a>' | safe }}{{ ' x ' | trim }}{{ 'xax'.strip('x') }}", "&lt;a&gt;<a>xa"),
        ("{{ [3, 1, 2] | sort | join('-') }}{{ ['b', 'a', 'b'] | unique | list }}", "1-2-3['b', 'a']"),
        ("{% for k, v in {'a': 1}.items() %}{% if k in ['a'] %}{{ v }}{% endif %}{% endfor %}", "1"),
        ("{{ {'a': 1}.keys() | list }}{{ {'a': 1}.values() | first }}", "['a']1"),
        ("{% for m in messages if m.n > 1 %}{{ loop.index }}{{ m.n }}{% endfor %}", "12"),
        ("{% for g in messages | groupby('n') %}{{ g.grouper }}{{ g.list | length }}{% endfor %}", "1121"),
        ("{% macro f(a) %}{{ a }}{{ varargs }}{{ kwargs }}{% endmacro %}{{ f(*[1, 2], **{'x': 3}) }}", "1(2,){'x': 3}"),
        ("{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.current }}", "aba"),
        ("{% for m in messages %}{{ loop.changed(m.n) }}{{ loop.cycle('x', 'y') }}{% endfor %}", "TruexTruey"),
        ("{{ '{} {n:>3}'.format(1, n=2) }}{{ '%5.1f%%' % 2.25 }}{{ '%(a)s' % {'a': 1} }}", "1   2  2.2%1"),
        ("{{ messages | map(attribute='n') | list | tojson(indent=2) }}", "[\n  1,\n  2\n]"),
        ("{{ messages | selectattr('n', 'gt', 1) | map(attribute='n') | first }}", "2"),
    ],
)  # fmt: skip
def test_bounded_operations_do_what_jinja_does(source: str, expected: str) -> None:
    assert Renderer().render(source, {"messages": [{"n": 1}, {"n": 2}]}) == expected
