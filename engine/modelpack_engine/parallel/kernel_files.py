"""Where a rank keeps the kernels that MLX compiles while it runs.

MLX leaves them as files in the directory for temporary ones (`mlx/backend/cuda/jit_module.cpp`,
`mlx/backend/cpu/compiled.cpp`), and loads a file that is there without asking whether it is whole.
Ranks come to the same kernel at the same moment, so that one would load what another is writing.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path

#: Where MLX keeps CUDA's kernels, if they are not to go with the temporary files.
PTX_DIRECTORY = "MLX_PTX_CACHE_DIR"


def separate(rank: int, environ: MutableMapping[str, str] = os.environ) -> None:
    """Let a rank but 0 have directories of its own, which stay; before MLX compiles anything."""
    if rank == 0:
        return
    from platformdirs import user_cache_path

    directory = user_cache_path("modelpack") / "ranks" / str(rank)
    directory.mkdir(parents=True, exist_ok=True)
    environ["TMPDIR"] = str(directory)
    if given := environ.get(PTX_DIRECTORY):
        environ[PTX_DIRECTORY] = str(Path(given, f"rank-{rank}"))
