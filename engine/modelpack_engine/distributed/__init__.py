"""One model on many devices: tensor parallelism over the ranks of a group.

Every rank is a process with a device of its own and holds a part of each layer; mlx-lm's models
split themselves (`model.shard(group)`), and MLX's collectives (`mx.distributed`) add the parts up.
Rank 0 leads: it alone has a scheduler, requests and HTTP, and tells the others (the followers)
what each step computes over a channel of our own.

    launching.py    starts the ranks of this machine, and ends all of them if one ends
    place.py        which rank this process is, as a launcher's environment says
    kernel_files.py where each rank keeps the kernels that MLX compiles
    wire.py         messages: framed, bounded, checked
    steps.py        a step's batch as bytes
    channel.py      the channel: rank 0's end and a follower's
    group.py        MLX's group; tokens that rank 0 chose, on every rank
    order.py        collectives in one order on all ranks
    sharding.py     a model's part of this rank
    leading.py      rank 0: the ranks, and an engine over them
    following.py    every other rank
    joining.py      from the environment to a rank that leads or follows
    stored.py       models of the store, on all ranks
"""

from modelpack_engine.platform import blas

blas.prepare()  # before MLX, which most of these import: whoever comes here first
