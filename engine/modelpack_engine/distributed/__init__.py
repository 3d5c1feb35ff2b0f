"""One model on many devices: tensor parallelism over the ranks of a group.

Each rank is a process with its own device and holds a part of each layer. mlx-lm's models split
themselves (`model.shard(group)`), and MLX's collectives (`mx.distributed`) add up the parts. Rank 0
leads: only rank 0 has a scheduler, requests and HTTP. It sends each step to the other ranks, the
followers, over a channel of sockets.

    launch    starts the ranks of this machine, ends all of them if one ends, and joins their group
    group     MLX's group of ranks, and collectives in the same order on all of them
    channel   the messages between ranks, and both ends of their connections
    sharding  reduces a model to this rank's part
    adapters  gives each rank its part of the adapters of requests
    leader    rank 0: an engine whose steps run on all ranks
    follower  every other rank

Read `leader` first. `modelpack_server.stored_models` loads stored models on all ranks.
"""

from modelpack_engine.platform import blas

blas.prepare()  # must run before MLX is imported, which most of these modules do
