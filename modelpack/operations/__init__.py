"""The operations behind the commands, grouped by subject; all of them move models with transfer.py.

Every long call takes two optional arguments: `progress`, a callback for reports of
`modelpack.progress.Progress`, and `stop`, with which another thread can cancel the call.
"""
