"""Runners: the forward passes of unmodified mlx-lm models, on the flattened batch of a step.

Read `model_runner` first, the interface. `tiers` finds the fastest way that a model runs correctly;
`paged` runs it that way, by the model that `adapted` has prepared.
"""

from modelpack_engine.patches import mlx_lm_imports

mlx_lm_imports.prepare()
