"""Offload: KV blocks that the prefix cache evicts, kept in host memory and on disk.

    tiers.py        PrefixOffload, which the block manager calls; memory and disk, with a thread
    directory.py    the files of blocks: bounded, shared by servers, checked when read

`runner/kv_offload.py` copies blocks between the device and these tiers. A block has the hash that
the prefix cache finds it by. It is saved when the prefix cache evicts it, and restored into a newly
allocated block when a prompt needs it. A long prefix is restored over several steps, while other
requests run.
"""
