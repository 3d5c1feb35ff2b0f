"""A Jinja environment for templates of strangers: no way out, no endless loop, no flood.

Jinja's sandbox keeps a template from reaching Python, but does not bound what it computes. Here
every rendering has a budget, charged for each turn of a loop, call, filter and macro, for what is
written and for the size of new values; `template_limits` refuses the single steps that would make
something huge. Constructs that Jinja compiles to bare Python are rewritten so that they charge.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from modelpack_engine.loaders.template_limits import (
    MAX_VALUE,
    TemplateLimitError,
    check_call,
    check_operands,
    check_value,
    size_of,
)

#: Turns of loops, calls and filters of one rendering.
MAX_STEPS = 300_000
#: Characters that one rendering may write, macros and blocks included.
MAX_OUTPUT = MAX_VALUE
#: Characters and items of all values that one rendering makes.
MAX_VOLUME = 256 * 1024 * 1024
#: Items of one `range`.
MAX_RANGE = 10_000
#: Seconds of one rendering; looked at between steps, each of which is short.
MAX_SECONDS = 5.0

# Of no use in prompts, and costly or hard to bound.
_WITHOUT_FILTERS = ("center", "pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr")


class _Budget:
    """What is left for one rendering."""

    def __init__(self) -> None:
        self.steps = MAX_STEPS
        self.output = MAX_OUTPUT
        self.volume = MAX_VOLUME
        self.deadline = time.monotonic() + MAX_SECONDS

    def step(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise TemplateLimitError(f"it takes more than {MAX_STEPS} steps")
        if time.monotonic() > self.deadline:
            raise TemplateLimitError(f"it takes longer than {MAX_SECONDS:g} seconds")

    def write(self, characters: int) -> None:
        self.output -= characters
        if self.output < 0:
            raise TemplateLimitError(f"it writes more than {MAX_OUTPUT} characters")

    def made(self, value: Any) -> Any:
        self.volume -= check_value(value)
        if self.volume < 0:
            raise TemplateLimitError("it takes too much memory")
        return value


_budget: ContextVar[_Budget] = ContextVar("_budget")


@contextmanager
def rendering() -> Iterator[None]:
    """Give what is compiled or rendered inside a budget of its own; nothing runs without one."""
    token = _budget.set(_Budget())
    try:
        yield
    finally:
        _budget.reset(token)


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """The environment of chat templates, with the settings of transformers."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            finalize=_written,
            optimized=False,  # computes at compile time, and keeps what that makes
            extensions=["jinja2.ext.loopcontrols", _Generation],
        )
        for name in _WITHOUT_FILTERS:
            del self.filters[name]
        self.filters = {name: bounded(filter_) for name, filter_ in self.filters.items()}
        self.globals["range"] = _range
        del self.globals["lipsum"]

    def charge(self, characters: int) -> None:
        """Charge one turn of a loop whose body writes so many characters as they stand.

        The turn itself is charged as the call of this.
        """
        _budget.get().write(characters)

    def made(self, value: Any) -> Any:
        """Return a list, a dict or a slice of the template's; its size is charged by `call`."""
        return value

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call an object for a template."""
        budget = _budget.get()
        budget.step()
        check_call(obj, args, kwargs)
        return budget.made(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute an operator that makes large values of small ones."""
        budget = _budget.get()
        budget.step()
        check_operands(operator, left, right)
        return budget.made(super().call_binop(context, operator, left, right))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = _Charging().visit(super()._parse(source, name, filename))
        assert isinstance(tree, nodes.Template)
        tree.set_environment(self)
        return tree


class _Charging(NodeTransformer):
    """Rewrites what Jinja would compile to bare Python into calls of the environment."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._loop(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._loop(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._loop(node)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return self._made(node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self._made(node) if node.ctx == "load" else self.generic_visit(node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return self._made(node)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        sliced = node.ctx == "load" and isinstance(node.arg, nodes.Slice)
        return self._made(node) if sliced else self.generic_visit(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        # a ~ b is a filter then, bounded as all filters are.
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(parts, "join", [], [], None, None, lineno=node.lineno)

    def _made(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return _call("made", node, node.lineno)

    def _loop(self, node: Any) -> nodes.Node:
        literal = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        charge = _call("charge", nodes.Const(literal), node.lineno)
        node.body.insert(0, nodes.ExprStmt(charge, lineno=node.lineno))
        assert isinstance(node, nodes.Node)
        return node


def _call(name: str, argument: nodes.Expr, line: int) -> nodes.Call:
    method = nodes.EnvironmentAttribute(name, lineno=line)
    return nodes.Call(method, [argument], [], None, None, lineno=line)


class _Generation(Extension):
    """`{% generation %}` marks for training what the model wrote; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 (as in Jinja's own)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def bounded(filter_: Callable[..., Any]) -> Callable[..., Any]:
    """Return the filter with a charge for each use, and limits on what goes in and comes out."""

    def charged(*args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        budget.step()
        check_call(filter_, args, kwargs)
        return budget.made(filter_(*args, **kwargs))

    # Jinja reads from its attributes whether a filter wants the context.
    charged.__dict__.update(getattr(filter_, "__dict__", {}))
    return charged


@jinja2.pass_context  # and so never computed at compile time
def _written(context: Context, value: Any) -> Any:
    """Charge what `{{ value }}` writes."""
    if not isinstance(value, (str, int, float, type(None), jinja2.Undefined)):
        size_of(value)
        value = str(value)
    _budget.get().write(len(value) if isinstance(value, str) else 1)
    return value


def _range(*args: int) -> range:
    made = range(*args)
    if len(made) > MAX_RANGE:
        raise TemplateLimitError(f"a range has {len(made)} items, the limit is {MAX_RANGE}")
    return made
