"""Kernels over paged KV: attention through block tables, and in-place writes of KV rows.

Pools are flat and token-major: [slots, KV heads, dim], with slot = block * block size + offset, or
[slots, 1, words] if they are quantised (see `quantised`). The kernels for Metal and CUDA have one
source (see `sources`). Each is compared with MLX's functions before its first use. Without a GPU,
without a kernel for a shape, or after a failed probe, MLX's functions run instead.

Order: MLX orders work on a GPU by the outputs of operations, and a pool that a kernel writes in
place is not an output. So `write_kv` has an output of its own, a token, and whatever reads the pool
afterwards must also read the token. `decode_attention` and the next `write_kv` look up the token by
the pool, which must be the array object that `write_kv` returned. Other readers must pass their
indices through `after`. A write waits for the previous write but not for readers: in a model, the
rows to write depend on what was read, or go to other slots.
"""

from modelpack_engine.kernels.operations import KernelSupport as KernelSupport
from modelpack_engine.kernels.operations import available as available
from modelpack_engine.kernels.operations import decode_attention as decode_attention
from modelpack_engine.kernels.operations import enable as enable
from modelpack_engine.kernels.operations import may_decode as may_decode
from modelpack_engine.kernels.operations import may_write as may_write
from modelpack_engine.kernels.operations import prefill_attention as prefill_attention
from modelpack_engine.kernels.operations import probe as probe
from modelpack_engine.kernels.operations import write_kv as write_kv
from modelpack_engine.kernels.plan import AttentionShape as AttentionShape
from modelpack_engine.kernels.plan import after as after
from modelpack_engine.kernels.plan import token_of as token_of
from modelpack_engine.kernels.plan import written as written
from modelpack_engine.kernels.prefill import TILE_ROWS as TILE_ROWS
from modelpack_engine.kernels.prefill import Tiles as Tiles
