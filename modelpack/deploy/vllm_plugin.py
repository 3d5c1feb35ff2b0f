"""The vLLM plugin that accepts `modelpack://REF` wherever vLLM accepts a model name.

vLLM calls `register` in every process, possibly several times, and first when `vllm serve` creates
its parser, before it parses arguments (vllm/plugins/__init__.py and vllm/engine/arg_utils.py of
0.33.0). Only `EngineArgs` has model names; the objects made from it, and all other processes, get
the directory.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from modelpack.deploy.vllm import SCHEME
from modelpack.errors import ModelpackError

if TYPE_CHECKING:
    from modelpack.deploy.vllm import VllmSettings

#: The packaged settings of the models opened in this process, by directory.
_opened: dict[str, VllmSettings] = {}
_log = logging.getLogger(__name__)
_MARK = "_modelpack_resolves"
#: Methods that read model names. If `EngineArgs` was not parsed, `__post_init__` is the first call.
_METHODS = ("__post_init__", "create_engine_config", "create_model_config")
#: Leases on the models of this process, since vLLM may open their files at any time.
_leases = ExitStack()
_FIELDS = ("model", "tokenizer", "hf_config_path")


def register() -> None:
    """Make vLLM's `EngineArgs` resolve `modelpack://` names; further calls have no effect."""
    from vllm.engine import arg_utils

    arguments: Any = arg_utils.EngineArgs
    if getattr(arguments, _MARK, False):
        return
    missing = [name for name in _METHODS if not callable(getattr(arguments, name, None))]
    if missing:
        # Only warn, so that vLLM keeps working with other models.
        _log.warning("%s names do not work: EngineArgs has no %s", SCHEME, ", ".join(missing))
        return
    for name in _METHODS:
        setattr(arguments, name, _resolving(getattr(arguments, name)))
    find = getattr(arg_utils, "get_model_path", None)
    if find is not None:  # offline processes call it during the first `__post_init__`
        arg_utils.get_model_path = _finding(find)
    setattr(arguments, _MARK, True)


def resolve(arguments: Any) -> None:
    """Replace the `modelpack://` names in an `EngineArgs` by directories.

    Raises the errors of `modelpack.pull`, and `UnsupportedError` for models that vLLM cannot read.
    """
    if _is_ours(arguments.model) and not getattr(arguments, "served_model_name", None):
        arguments.served_model_name = [arguments.model]
    for field in _FIELDS:
        value = getattr(arguments, field, None)
        if _is_ours(value):
            setattr(arguments, field, _directory(value))
    if arguments.model in _opened:
        _apply(_opened[arguments.model], arguments)
    draft = getattr(arguments, "speculative_config", None)
    if isinstance(draft, dict) and _is_ours(draft.get("model")):
        arguments.speculative_config = {**draft, "model": _directory(draft["model"])}


def _resolving(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **arguments: Any) -> Any:
        try:
            resolve(self)
        except ModelpackError as error:
            if not _is_command():
                raise
            hint = f"\nhint: {error.hint}" if error.hint else ""
            raise SystemExit(f"error: {error}{hint}") from None
        return method(self, *args, **arguments)

    return wrapped


def _is_command() -> bool:
    """Return whether this process is the command `vllm`, whose users want no traceback."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = spec.name if spec is not None else None
    return Path(sys.argv[0]).name == "vllm" or module == "vllm.entrypoints.cli.main"


def _finding(find: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(find)
    def wrapped(model: Any, *args: Any, **arguments: Any) -> Any:
        return _directory(model) if _is_ours(model) else find(model, *args, **arguments)

    return wrapped


def _is_ours(name: object) -> TypeGuard[str]:
    return isinstance(name, str) and name.startswith(SCHEME)


def _apply(settings: VllmSettings, arguments: Any) -> None:
    """Apply the packaged settings that the user does not override."""
    if settings.max_model_len is not None and getattr(arguments, "max_model_len", 0) is None:
        arguments.max_model_len = settings.max_model_len
    given = getattr(arguments, "override_generation_config", None)
    if settings.generation and isinstance(given, dict):
        arguments.override_generation_config = {**settings.generation, **given}


def _directory(name: str) -> str:
    from modelpack.deploy.vllm import open_model
    from modelpack.operations.remote import RemoteOptions
    from modelpack.trust.policy import Trust

    remote = RemoteOptions(trust=Trust.from_environment())  # a plugin has no options
    opened = open_model(name.removeprefix(SCHEME), remote=remote, until=_leases)
    directory = str(opened.directory)
    if directory not in _opened:
        _opened[directory] = opened.settings
        for message in opened.settings.notes:
            _log.warning("%s", message)
    return directory
