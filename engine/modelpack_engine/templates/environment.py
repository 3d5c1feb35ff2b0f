"""The Jinja environment of chat templates: a sandbox that charges each operation to a budget.

Jinja's sandbox keeps a template from reaching Python, but does not bound what it computes. Here
every call, filter, test and operator goes through the environment, and expressions that Jinja
compiles to bare Python (lists, slices, comparisons, loops) are rewritten to do so too.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.lexer import Token, TokenStream
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler, Joiner, Namespace
from jinja2.visitor import NodeTransformer

from modelpack_engine.templates.budget import (
    MAX_BITS,
    MAX_ITEMS,
    MAX_TEXT,
    Budget,
    TemplateLimitError,
    check_integer,
    check_text,
    too_large,
)
from modelpack_engine.templates.filters import (
    bounded,
    bounded_filters,
    call_method,
    check_percent,
    joined,
    text_of,
)

#: Tokens of one template; the longest of known models have some 6,000.
MAX_TOKENS = 50_000
#: Items of one `range`.
MAX_RANGE = 10_000
# Arguments that Jinja itself adds to calls.
_SCOPES = ("_loop_vars", "_block_vars")
# Arguments that `*` and `**` may add to a call.
_MAX_SPREAD = 1000

# Filters that `_Charging` inserts. Templates cannot use their names, which contain spaces.
_TURN, _MADE, _COMPARED, _CONCAT, _SPREAD = (
    "a turn", "a value", "a comparison", "a concatenation", "arguments",
)  # fmt: skip


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """The environment of chat templates, with the settings of transformers.

    `budget` limits the current rendering: set a new one before each rendering.
    """

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            finalize=self._written,
            optimized=False,  # the optimizer computes at compile time, without a budget
            extensions=["jinja2.ext.loopcontrols", _Generation],
        )
        self.budget = Budget()
        current = self._current
        self.filters = {
            **bounded_filters(current),
            _TURN: self._turn,
            _MADE: lambda value: self.budget.made(value),
            _COMPARED: self._compared,
            _CONCAT: lambda values: self.budget.made(joined(self.budget, values)),
            _SPREAD: _spread,
        }
        self.tests = {
            name: bounded(current, cast(Callable[..., Any], test), name)
            for name, test in self.tests.items()
        }
        self.globals = {
            "range": _range,
            "dict": dict,
            "namespace": _Namespace,
            "cycler": Cycler,
            "joiner": Joiner,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call an object for a template."""
        budget = self.budget
        budget.step()
        scopes = {name: kwargs.pop(name) for name in _SCOPES if name in kwargs}
        budget.check_arguments((*args, *kwargs.values()))
        method = getattr(obj, "__wrapped__", obj)  # Jinja wraps str.format
        if isinstance(method, types.BuiltinMethodType) and method.__self__ is not None:
            return budget.made(call_method(budget, obj, method, args, kwargs))
        if not self._is_callable(obj):
            raise TemplateLimitError(f"a {type(obj).__name__} cannot be called")
        return budget.made(super().call(context, obj, *args, **kwargs, **scopes))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute an operator that can make large values of small ones."""
        budget = self.budget
        budget.step()
        _check_operands(budget, operator, left, right)
        return budget.made(super().call_binop(context, operator, left, right))

    def _current(self) -> Budget:
        return self.budget

    def _is_callable(self, obj: Any) -> bool:
        if isinstance(obj, types.MethodType):
            return isinstance(obj.__self__, (LoopContext, Cycler))
        if isinstance(obj, (Macro, LoopContext, BlockReference, Joiner, Undefined)):
            return True
        return any(obj is function for function in self.globals.values())

    def _turn(self, literal: int) -> bool:
        """Charge an iteration of a loop, or a run of a macro or block, of `literal` characters."""
        self.budget.step()
        self.budget.write(literal)
        return True

    def _compared(self, value: Any) -> Any:
        self.budget.check_time()
        return value

    def _written(self, value: Any) -> Any:
        """Return the text that `{{ value }}` writes, and charge it."""
        text = text_of(self.budget, value)
        self.budget.write(len(text))
        return text

    def _tokenize(
        self, source: str, name: str | None, filename: str | None = None, state: str | None = None
    ) -> TokenStream:
        stream = super()._tokenize(source, name, filename, state)
        return TokenStream(_limited(stream), name, filename)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = _Charging().visit(super()._parse(source, name, filename))
        assert isinstance(tree, nodes.Template)
        tree.set_environment(self)
        return tree


class _Namespace(Namespace):
    """A namespace whose text omits its values, which may contain the namespace itself."""

    def __repr__(self) -> str:
        return "<Namespace>"


class _Charging(NodeTransformer):
    """Rewrites expressions that Jinja would compile to bare Python as calls of our filters."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        body = self._charged_body(node)
        if node.test is not None:
            turn = _filter(_TURN, nodes.Const(0, lineno=node.lineno))
            node.test = nodes.And(turn, node.test, lineno=node.lineno)
        return body

    def visit_List(self, node: nodes.List | nodes.Dict) -> nodes.Node:
        return self._wrapped(_MADE, node)

    visit_Dict = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self._wrapped(_MADE, node) if node.ctx == "load" else self.generic_visit(node)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        return self._wrapped(_COMPARED, node)

    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        if isinstance(node.value, int):
            check_integer(node.value)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        sliced = node.ctx == "load" and isinstance(node.arg, nodes.Slice)
        return self._wrapped(_MADE, node) if sliced else self.generic_visit(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(_CONCAT, nodes.List(node.nodes, lineno=node.lineno))

    def visit_ScopedEvalContextModifier(self, node: nodes.Node) -> nodes.Node:
        raise jinja2.TemplateSyntaxError("autoescape is not available", node.lineno)

    def _wrapped(self, name: str, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return _filter(name, node)

    def _spread(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        for name in ("dyn_args", "dyn_kwargs"):
            if (value := getattr(node, name)) is not None:
                setattr(node, name, _filter(_SPREAD, value))
        assert isinstance(node, nodes.Node)
        return node

    visit_Call = visit_Filter = visit_Test = _spread

    def _charged_body(self, node: Any) -> nodes.Node:
        literal = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        charge = _filter(_TURN, nodes.Const(literal, lineno=node.lineno))
        node.body.insert(0, nodes.ExprStmt(charge, lineno=node.lineno))
        assert isinstance(node, nodes.Node)
        return node

    visit_Macro = visit_CallBlock = visit_Block = _charged_body


class _Generation(Extension):
    """`{% generation %}`, which marks the model's text for training and has no effect here."""

    tags = {"generation"}  # noqa: RUF012 (as in Jinja's own)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _filter(name: str, node: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _limited(tokens: TokenStream) -> Iterator[Token]:
    for count, token in enumerate(tokens):
        if count >= MAX_TOKENS:
            raise jinja2.TemplateSyntaxError(f"it has more than {MAX_TOKENS} tokens", token.lineno)
        yield token


def _check_operands(budget: Budget, operator: str, left: Any, right: Any) -> None:
    if operator == "*":
        for value, count in ((left, right), (right, left)):
            limit = MAX_TEXT if isinstance(value, str) else MAX_ITEMS
            repeats = isinstance(value, (str, list, tuple)) and isinstance(count, int)
            if repeats and len(value) * count > limit:
                raise too_large()
    elif operator == "+":
        if isinstance(left, str) and isinstance(right, str):
            check_text(len(left) + len(right))
    elif operator == "**":
        if isinstance(left, int) and isinstance(right, int) and right > 0:
            check_integer(1 << min(left.bit_length() * right, MAX_BITS + 1))
    elif isinstance(left, str):
        check_percent(budget, left, right)


def _spread(values: Any) -> Any:
    if not isinstance(values, (list, tuple, dict)) or len(values) > _MAX_SPREAD:
        raise TemplateLimitError(f"* and ** accept at most {_MAX_SPREAD} items")
    return values


def _range(*args: int) -> range:
    made = range(*args)
    if len(made) > MAX_RANGE:
        raise TemplateLimitError(f"a range has {len(made)} items, the limit is {MAX_RANGE}")
    return made


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    if len(format) > 1000:
        raise TemplateLimitError("strftime_now takes a format of at most 1000 characters")
    return datetime.now().strftime(format)


#: Characters of a template; the longest of known models have some 20,000.
MAX_TEMPLATE = 512 * 1024

# Exceptions that a template may raise if it does not fit the messages.
_FAILURES = (
    jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError,
    SyntaxError, TypeError, ValueError,
)  # fmt: skip


class TemplateFailedError(Exception):
    """A template failed; the text says why."""


class Renderer:
    """Renders one template at a time; for a single thread."""

    def __init__(self) -> None:
        self._environment = TemplateEnvironment()
        self._compiled = lru_cache(maxsize=32)(self._compile)

    def render(self, source: str, variables: Mapping[str, Any]) -> str:
        """Return the prompt; raises `TemplateFailedError`."""
        self._environment.budget = Budget()
        try:
            return self._compiled(source).render(variables)
        except _FAILURES as error:
            raise TemplateFailedError(_described(error)) from error
        finally:
            self._environment.budget = Budget()  # frees the values that the budget has measured

    def check(self, source: str) -> None:
        """Raise `TemplateFailedError` for a template that does not compile."""
        try:
            self._compiled(source)
        except _FAILURES as error:
            raise TemplateFailedError(_described(error)) from error

    def _compile(self, source: str) -> jinja2.Template:
        if len(source) > MAX_TEMPLATE:
            raise ValueError(f"it has {len(source)} characters, the limit is {MAX_TEMPLATE}")
        return self._environment.from_string(source)


def _described(error: Exception) -> str:
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"line {error.lineno}: {error.message}"
    if isinstance(error, RecursionError):
        return "it calls itself without end"
    if isinstance(error, MemoryError):
        return "it takes too much memory"
    text = str(error)[:500]
    if text and isinstance(error, (jinja2.TemplateError, ValueError)):
        return text
    return f"{type(error).__name__}: {text}"
