"""The import of mlx-vlm's model classes without the rest of mlx-vlm.

`mlx_vlm/__init__.py` imports its generator, server and converters, which need datasets, OpenCV and
mlx-audio: several hundred megabytes that no model class uses. So `prepare` puts the package into
`sys.modules` and never runs its `__init__.py`; as that would, it tells transformers, which the
processors use, not to warn that there is no PyTorch. This can be removed when `import
mlx_vlm.models.llava` imports none of them.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import threading

_NAME = "mlx_vlm"
_lock = threading.Lock()


def is_installed() -> bool:
    """Return whether mlx-vlm and Pillow, the extra `vision`, are installed."""
    return all(importlib.util.find_spec(name) is not None for name in (_NAME, "PIL"))


def prepare() -> None:
    """Put the bare package into `sys.modules`, unless mlx-vlm is imported or not installed."""
    with _lock:
        if _NAME in sys.modules:
            return
        spec = importlib.util.find_spec(_NAME)
        if spec is not None:
            os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
            sys.modules[_NAME] = importlib.util.module_from_spec(spec)
