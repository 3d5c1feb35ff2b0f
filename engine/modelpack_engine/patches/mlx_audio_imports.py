"""The import of mlx-audio's speech models without the rest of mlx-audio.

`mlx_audio/stt/models/__init__.py` imports all of its models, and transformers with them: a second
of CPU time for models that are not used. So `prepare` puts the packages into `sys.modules` and
never runs their `__init__.py`. This can be removed when
`import mlx_audio.stt.models.whisper` imports no transformers.
"""

from __future__ import annotations

import importlib.util
import sys
import threading

_NAME = "mlx_audio"
_PACKAGES = (_NAME, f"{_NAME}.stt", f"{_NAME}.stt.models")
_lock = threading.Lock()


def is_installed() -> bool:
    """Return whether mlx-audio, of the extra `audio`, is installed."""
    return importlib.util.find_spec(_NAME) is not None


def prepare() -> None:
    """Put the bare packages into `sys.modules`, unless imported or not installed."""
    with _lock:
        for name in _PACKAGES:
            if name in sys.modules:
                continue
            spec = importlib.util.find_spec(name)
            if spec is None:
                return
            sys.modules[name] = importlib.util.module_from_spec(spec)
