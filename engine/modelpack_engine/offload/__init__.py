"""Offload: prefixes that the KV cache has no room for, in host memory and on disk.

    identity.py     what keys and values depend on besides their tokens
    memory.py       host memory: bounded, least recently used first to go
    block_file.py   one block as a file: checked when read, complete or not there
    directory.py    the files: bounded, shared by servers, found again after a restart
    tiers.py        both together, and the thread that reads and writes files
    prefixes.py     what the block manager asks and tells: plain integers and bytes
    mover.py        blocks off the device and back, in batches between steps
    opening.py      from the engine's settings to all of this

A block goes by the hash that the prefix cache finds it by. It leaves the device when it is evicted
there, and comes back into a fresh block when a prompt needs it, some of it in each step, while
others go on. Nothing that is read is used before its checksum has been compared.
"""
