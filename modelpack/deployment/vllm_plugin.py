"""The plugin by which vLLM takes `modelpack://REF` wherever it takes the name of a model.

vLLM calls `register` in every process, perhaps often, and first where the parser of `vllm serve` is
made: before there are arguments (vllm/plugins/__init__.py and vllm/engine/arg_utils.py of 0.33.0).
Only `EngineArgs` knows names; what is made of it, and all other processes, get the directory.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeGuard

from modelpack.deployment.vllm import SCHEME

_log = logging.getLogger(__name__)
_MARK = "_modelpack_resolves"
#: Methods that read the names. Where nothing was parsed, the first of them is what calls us.
_METHODS = ("__post_init__", "create_engine_config", "create_model_config")
_FIELDS = ("model", "tokenizer", "hf_config_path")


def register() -> None:
    """Have vLLM's `EngineArgs` resolve `modelpack://` names; does so once."""
    from vllm.engine import arg_utils

    arguments: Any = arg_utils.EngineArgs
    if getattr(arguments, _MARK, False):
        return
    missing = [name for name in _METHODS if not callable(getattr(arguments, name, None))]
    if missing:
        # vLLM has to go on working for those who have no models of ours.
        _log.warning("%s names do not work: EngineArgs has no %s", SCHEME, ", ".join(missing))
        return
    for name in _METHODS:
        setattr(arguments, name, _resolving(getattr(arguments, name)))
    find = getattr(arg_utils, "get_model_path", None)
    if find is not None:  # what an offline process asks while the first `__post_init__` is running
        arg_utils.get_model_path = _finding(find)
    setattr(arguments, _MARK, True)


def resolve(arguments: Any) -> None:
    """Put directories in the place of the `modelpack://` names in an `EngineArgs`.

    Raises what `modelpack.pull` raises, and `UnsupportedError` for models that vLLM cannot read.
    """
    if _is_ours(arguments.model) and not getattr(arguments, "served_model_name", None):
        arguments.served_model_name = [arguments.model]
    for field in _FIELDS:
        value = getattr(arguments, field, None)
        if _is_ours(value):
            setattr(arguments, field, _directory(value))
    draft = getattr(arguments, "speculative_config", None)
    if isinstance(draft, dict) and _is_ours(draft.get("model")):
        arguments.speculative_config = {**draft, "model": _directory(draft["model"])}


def _resolving(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **arguments: Any) -> Any:
        resolve(self)
        return method(self, *args, **arguments)

    return wrapped


def _finding(find: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(find)
    def wrapped(model: Any, *args: Any, **arguments: Any) -> Any:
        return _directory(model) if _is_ours(model) else find(model, *args, **arguments)

    return wrapped


def _is_ours(name: object) -> TypeGuard[str]:
    return isinstance(name, str) and name.startswith(SCHEME)


def _directory(name: str) -> str:
    from modelpack.deployment.vllm import model_directory
    from modelpack.operations.remote import RemoteOptions

    remote = RemoteOptions()
    policy = os.environ.get("MODELPACK_POLICY")
    if policy:  # there are no options to say it by
        from modelpack.supply.trust import Trust

        remote = RemoteOptions(trust=Trust.of([], Path(policy)))
    return str(model_directory(name.removeprefix(SCHEME), remote=remote))
