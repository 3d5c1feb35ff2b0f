# ruff: noqa: E501 (templates are clearer in one line)
"""Templates that try to take all time or memory, by the feature that they abuse."""

from __future__ import annotations

GROWING = "{% set ns = namespace(s=['lol']) %}{% for i in range(40) %}"
# A list that contains one list three times, 40 levels deep: small in memory, 3^40 items as text.
LAUGH = GROWING + "{% set ns.s = [ns.s, ns.s, ns.s] %}{% endfor %}"
TUPLES = GROWING + "{% set ns.s = (ns.s, ns.s, ns.s) %}{% endfor %}"
BIG = "{% set s = 'a' * 8000000 %}"
MANY = "{% for i in range(9999) %}"

FAST = {
    "batch fill": "{{ [1] | batch(1000000000, 0) | list }}",
    "slice": "{{ [1] | slice(1000000000) | list | length }}",
    "list of text": BIG + "{{ s | list | length }}",
    "map text": BIG + "{{ s | map('upper') | list | length }}",
    "map upper x big": "{{ (['a'*1000000]*7) | map('upper') | list | length }}{% for i in range(99) %}{% set x=(['a'*1000000]*7) | map('upper') | list %}{% endfor %}",
    "laugh ==": LAUGH + "{{ ns.s == ns.s[:] }}",
    "laugh in": LAUGH + "{{ 1 in ns.s }}",
    "laugh <": LAUGH + "{{ [ns.s] < [ns.s] }}",
    "laugh tojson": LAUGH + "{{ ns.s | tojson }}",
    "laugh string": LAUGH + "{{ ns.s | string }}",
    "laugh write": LAUGH + "{{ ns.s }}",
    "laugh unique": LAUGH + "{{ [ns.s, ns.s] | unique | list }}",
    "laugh tuple": TUPLES + "{{ {ns.s: 1} }}",
    "laugh varargs": "{% macro f() %}{{ f(varargs, varargs) }}{% endmacro %}{{ f(1) }}",
    "laugh kwargs": "{% macro f() %}{{ kwargs == kwargs }}{{ f(a=kwargs, b=kwargs) }}{% endmacro %}{{ f(a=1) }}",
    "laugh join": LAUGH + "{{ ns.s | join }}",
    "list * n": "{{ ([['a']*1000] * 200) == ([['a']*1000]*200) }}{{ ([['a']*250000] * 250000) == 1 }}",
    "split": BIG + "{{ s.split('a') | length }}",
    "split ws": "{% set s = 'a ' * 4000000 %}{{ s.split() | length }}",
    "splitlines": "{% set s = 'a\n' * 4000000 %}{{ s.splitlines() | length }}",
    "title filter": "{% set s = 'a-' * 4000000 %}{{ s | title | length }}",
    "wordcount": "{% set s = 'a ' * 4000000 %}{{ s | wordcount }}",
    "urlencode": "{% set s = '%' * 8000000 %}{{ s | urlencode | length }}",
    "escape": "{% set s = '<' * 8000000 %}{{ s | e | length }}",
    "replace markup": "{% set s = '<' * 800000 %}{{ (s|e).replace('&', s) }}",
    "autoescape": "{% autoescape true %}{% set s = '<' * 8000000 %}{{ s }}{{ s ~ s }}{% endautoescape %}",
    "round": "{{ 5 | round(-1000000000) }}",
    "int": "{{ ('0x' ~ 'f' * 8000000) | int(0, 16) }}",
    "to_bytes": "{{ (5).to_bytes(100000000, 'big') }}",
    "encode": BIG + "{{ s.encode('utf-32') }}",
    "star width": "{{ '%*d' % (1000000000, 1) }}",
    "star width2": "{{ '%-*d' | format(1000000000, 1) }}",
    "precision": "{{ '%.999999999f' % 1.5 }}",
    "nested format": "{{ '{:{a}{b}{b}}'.format(1, a='>9', b='9999') }}",
    "attr format": "{% set f = 'a{:>99999999}' | attr('format') %}{{ f(1) }}",
    "format_map": "{{ '{a:>999999999}'.format_map({'a':1}) }}",
    "ascii": "{% set s = '😀' * 2000000 %}{{ '%a' % s }}",
    "repr": "{% set s = '\x00' * 8000000 %}{{ '%r' % [s] }}",
    "tojson control": "{% set s = '\x00' * 8000000 %}{{ s | tojson | length }}",
    "tojson indent": "{{ range(9999)|list | tojson(indent=100000) }}",
    "tojson indent text": "{{ range(9999)|list | tojson(indent='a'*1000000) }}",
    "tojson separators": "{{ range(9999)|list | tojson(separators=('a'*1000000, 'b')) }}",
    "sum lists": "{{ ([[1]]*200000) | sum(start=[]) | length }}",
    "sum tuples": "{{ ([(1,)]*200000) | sum(start=()) | length }}",
    "filtered loop": "{% for i in range(9999) %}{% for j in range(9999) if false %}{% endfor %}{% endfor %}",
    "filtered text": BIG + "{% for i in s if false %}{% endfor %}",
    "loop text": BIG + "{% for i in s %}{% endfor %}",
    "recursive": "{% for i in [1] recursive %}{{ loop([1,1]) }}{% endfor %}",
    "blocks": "{% block a %}"
    + "x" * 100_000
    + "{% endblock %}{% block b %}"
    + MANY
    + "{{ self.a() }}{% endfor %}{% endblock %}",
    "splat": "{% macro f() %}{{ varargs|length }}{% endmacro %}{{ f(*('é'*8000000)) }}",
    "splat map": "{{ 'x'.format(*(range(9999)|list)) }}{{ 'x' | replace(*('abc')) }}",
    "cycler": "{% set c = cycler(*range(9999)) %}{% for i in range(9999) %}{{ c.next() }}{% endfor %}",
    "joiner": BIG + "{% set j = joiner(s) %}{% for i in range(9999) %}{{ j() }}{% endfor %}",
    "joiner set": BIG
    + "{% set j = joiner(s) %}{% for i in range(9999) %}{% set x = j() ~ 'a' %}{% endfor %}",
    "dict big": "{{ dict([(1,2)]*1000) }}{% set ns=namespace(d={}) %}{% for i in range(9999) %}{% set ns.d = dict(ns.d, **{'k%d' % i: ns.d}) %}{% endfor %}",
    "sort": "{% for i in range(999) %}{% set x = (['a'*8000, 'b'*8000]*400) | sort(case_sensitive=true) %}{% endfor %}",
    "many parens": "{{ " + "[" * 400 + "]" * 400 + " }}",
    "many ifs": "{% if a %}" * 300 + "{% endif %}" * 300,
    "hex": "{% set x = 0x" + "f" * 500_000 + " %}{% set y = x * x %}",
    "raise": "{{ raise_exception('a'*8000000) }}",
    "previtem": "{% for x in [1,2]|batch(2) %}{{ loop.previtem == loop.nextitem }}{% endfor %}{% set ns = namespace(l=['lol']) %}{% for i in range(40) %}{% set ns.l = [ns.l, ns.l, ns.l] %}{% endfor %}{% for x in [ns.l, ns.l] %}{{ loop.changed(x) }}{% endfor %}",
    "capture": "{% set ns=namespace(s='ab') %}{% for i in range(60) %}{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = x %}{% endfor %}",
    "call block": "{% macro f(n) %}{% if n %}{{ caller(n) }}{{ caller(n) }}{% endif %}{% endmacro %}"
    + "{% call(n) f(1) %}" * 15
    + "x" * 1000
    + "{% endcall %}" * 15,
    "filter block": "{% filter replace('a', 'a'*1000) %}{% filter replace('a', 'a'*1000) %}{% filter replace('a', 'a'*1000) %}aaaa{% endfilter %}{% endfilter %}{% endfilter %}",
    "map attr": "{{ messages | map(attribute='a' * 8000000) | list }}{{ messages | map(attribute='.'.join(['a']*200000)) | list }}",
    "deep list": "{% set ns = namespace(l=[]) %}{% for i in range(9999) %}{% set ns.l = [ns.l] %}{% endfor %}{{ ns.l == ns.l[:] }}",
    "indent": "{% set s = '\n' * 4000000 %}{{ s | indent(1) | length }}",
    "indent blank": "{% set s = 'a\n' * 200000 %}{{ s | indent('b'*1000, true, true) | length }}",
}
# These run for seconds before they fail.
SLOW = {
    "batch fill small": "{% for i in range(9999) %}{% set x = [1] | batch(9999, 'x') %}{% endfor %}",
    "slice2": "{{ [1] | slice(9999) | list | length }}{% for i in range(9999) %}{% set x=[1] | slice(9999) %}{% endfor %}",
    "list emoji": "{% set s = '😀' * 240000 %}{% for i in range(999) %}{% set x = s | list %}{% endfor %}",
    "laugh slice loop": "{% set ns=namespace(l=range(9999)|list) %}{% for i in range(9999) %}{% set ns.l = ns.l[:] %}{% endfor %}",
    "concat list": "{% set ns = namespace(l=['aaaaaaaaaa']) %}{% for i in range(60) %}{% set ns.l = ns.l + ns.l %}{% endfor %}{{ ns.l|length }}",
    "substring": "{% set a = ('a'*4000000) %}{% set b = ('a'*2000000) ~ 'b' %}{% for i in range(9999) %}{{ b in a }}{% endfor %}",
    "count pathological": "{% set a = ('ab'*4000000) %}{% for i in range(9999) %}{{ a.count('ba'*100000) }}{% endfor %}",
    "loop length": BIG + "{% for i in s recursive %}{{ loop.length }}{% endfor %}",
    "changed": "{% set l=['a'*1000]*8000 %}{% for i in range(9999) %}{% for j in range(99) %}{{ loop.changed(l, l) }}{% endfor %}{% endfor %}",
    "block exp": "".join(
        f"{{% block b{i} %}}" + f"{{{{ self.b{i + 1}() }}}}" * 2 + "{% endblock %}"
        for i in range(30)
    )
    + "{% block b30 %}x{% endblock %}",
    "dictsort": "{% set ns=namespace(d={}) %}{% for i in range(9999) %}{% set ns.d = dict(ns.d, **{'k%d' % i: i}) %}{% set x = ns.d | dictsort %}{% endfor %}",
    "groupby": "{{ (messages * 50000) | groupby('content') | length }}{% for i in range(999) %}{% set x = (messages*10000)|groupby('role') %}{% endfor %}",
    "range list": "{% for i in range(9999) %}{% set x = range(10000) | list %}{% endfor %}",
    "compares": "{% set a = 'x' * 8000000 %}{% set b = ('x' * 7999999) ~ 'y' %}{{ "
    + " or ".join(["a == b"] * 9000)
    + " }}",
    "many outputs": "{{a}}" * 100_000,
    "many adds": "{{ " + "+".join("1" * 20_000) + " }}",
    "many elifs": "{% if a %}" + "{% elif a %}" * 9000 + "{% endif %}",
    "many sets": "{% set v = 1 %}" * 9000,
    "trim": "{% set s = ' ' * 4000000 ~ 'a' %}{% for i in range(9999) %}{% set x = s | trim %}{% endfor %}",
    "trim chars": "{% set s = 'a' * 4000000 %}{% set c = ('b' * 4000000) ~ 'a' %}{{ s.strip(c) }}",
    "truncate": "{% set s = 'a ' * 4000000 %}{% for i in range(9999) %}{% set x = s | truncate(7000000) %}{% endfor %}",
}
