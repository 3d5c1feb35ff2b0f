"""reads_like: whether a class of mlx-lm computes what a class that the engine knows computes.

Fused kernels replace a layer only if its source and the names that it uses mean the same.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from functools import cache
from types import CodeType, FunctionType

import mlx.core as mx
import mlx.nn as nn

from modelpack_engine.patches.functions import native_swiglu, swiglu

#: What `mx.compile` makes of a function: it does not know what of.
_COMPILED = type(mx.compile(lambda x: x))


def reads_like(module: nn.Module, known: type[nn.Module]) -> bool:
    """Return whether `module` answers a call with the same code as instances of `known`."""
    one, other = type(module).__call__, known.__call__
    if not isinstance(one, FunctionType) or not isinstance(other, FunctionType):
        return False
    return one is other or (
        _text(one.__code__) is not None
        and _text(one.__code__) == _text(other.__code__)
        and _means_the_same(one, other)
    )


@cache
def _text(code: CodeType) -> str | None:
    """Return a function's text without annotations and docstring; None if it has none."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError):
        return None
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef):
        return None
    return _bare(definition)


def _bare(definition: ast.FunctionDef) -> str:
    definition.returns = None
    for argument in (*definition.args.args, *definition.args.kwonlyargs):
        argument.annotation = None
    if ast.get_docstring(definition) is not None:
        del definition.body[0]
    return ast.dump(definition)


def _means_the_same(one: FunctionType, other: FunctionType) -> bool:
    """Return whether both find the same objects under the global names that they use."""
    names = [name for name in other.__code__.co_names if name in other.__globals__]
    return all(_meaning(one, name) == _meaning(other, name) for name in names)


def _meaning(function: FunctionType, name: str) -> object:
    """Return what a name means to a function.

    Whether or not that was swapped for the same in faster; of what `mx.compile` made, the text.
    """
    meaning = function.__globals__.get(name)
    if meaning is swiglu:
        return native_swiglu
    if type(meaning) is _COMPILED:
        return _definition(function.__module__, name) or meaning
    return meaning


@cache
def _definition(module: str, name: str) -> str | None:
    """Return the text of a function that a module defines, None if it does not."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (KeyError, OSError, TypeError, SyntaxError):
        return None
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    return _bare(found[0]) if len(found) == 1 else None
