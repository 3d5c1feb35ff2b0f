"""The verbs: each joins stores, registries and packaging into what a user asks for.

Every long call takes `progress=`, called with `modelpack.progress.Progress` reports, and `stop=`,
through which another thread can ask it to end early.
"""
