"""Kernels over paged KV: decode attention through the block table, and writing KV rows in place.

Pools are flat and token-major: [slots, KV heads, dim], slot = block * block size + offset; or
[slots, 1, words] where they are quantised (see `attention.quantised`). On Metal
and CUDA the two operations are kernels made of one text (see `sources`); each is probed when it is
first needed against MLX's own functions, and where there is no GPU, no kernel for a shape, or a
failed probe, those functions run instead.

Order. A kernel that writes in place is outside of what MLX knows: it orders work on a GPU by the
buffers that an operation puts out, and a pool is nobody's output. So `write_kv` puts out a token,
and whatever reads a pool afterwards must read the token, too: `decode_attention` and the next
`write_kv` know it by the pool that they get, which has to be the very array that `write_kv`
returned; any other reader has to take its indices through `after`. A write waits for the write
before, not for readers: in a model its rows follow from what they read, or go to other slots.
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
