"""How much work MLX hands to a GPU at once.

MLX hands over what it has encoded when the arrays of it add up to a limit, and counts a whole pool
of keys for every kernel that reads some of it: with gigabytes of KV cache, that is after every
layer. The limit of operations is enough. MLX reads both from the environment when it first uses the
GPU (mlx/backend/cuda/device.cpp, mlx/backend/metal/device.cpp).
"""

from __future__ import annotations

import os

#: Megabytes: more than any pool has.
NO_LIMIT = "100000000"


def count_operations_only() -> None:
    """Set no limit of bytes, unless the user's environment has one."""
    os.environ.setdefault("MLX_MAX_MB_PER_BUFFER", NO_LIMIT)
