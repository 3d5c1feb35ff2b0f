"""Specimen: a model, mlx-lm's tokens for it, and runners to compare with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache

from modelpack_engine.patches.lora import LINEARS, Matrices
from modelpack_engine.runner.model_layout import layout_of
from modelpack_engine.runner.model_runner import ModelRunner, make_runner
from tests.engine.zoo.configuration import Configuration, prompts
from tests.engine.zoo.driving import Driver, Setting
from tests.engine.zoo.table import why_not_adapted

#: Enough for the first prompt to need another block, so that a tight cache must preempt.
NUM_TOKENS = 14


@dataclass
class Reference:
    """Greedy tokens of each prompt, by mlx-lm's path for a single request.

    `gap` is the smallest difference between the log-probabilities of the best and the next token:
    if it is close to zero, equality is luck. `distinct` counts different tokens: a model that
    repeats one token would be equal with any mistake.
    """

    tokens: list[list[int]] = field(default_factory=list)
    gap: float = float("inf")

    @property
    def distinct(self) -> int:
        return len({token for tokens in self.tokens for token in tokens})


@dataclass
class Specimen:
    """A configuration's model, built once for all tests of it."""

    configuration: Configuration
    model: nn.Module
    reference: Reference
    runners: dict[bool, ModelRunner] = field(default_factory=dict)

    def runner(self, *, exact: bool) -> ModelRunner:
        """Return a runner with shapes as on a CPU, or bucketed as on a GPU."""
        if exact not in self.runners:
            self.free()
            self.runners = {exact: self.make_runner(exact=exact)}
        return self.runners[exact]

    def free(self) -> nn.Module:
        """Return the model as it was before `runner`: another may have it."""
        for runner in self.runners.values():
            runner.undo()
        self.runners = {}
        return self.model

    def make_runner(self, **given: Any) -> ModelRunner:
        """Return a runner with 64 blocks of each group of layers, as `drive` expects them."""
        layout = layout_of(self.model)
        groups = layout.window_groups if layout is not None else ()
        return make_runner(self.model, num_blocks=64, window_blocks=(64,) * len(groups), **given)

    def drive(self, setting: Setting, runner: ModelRunner | None = None) -> Driver:
        """Run the five prompts, which arrive in different steps; all blocks are free at the end."""
        driver = Driver(runner or self.runner(exact=setting.exact), setting)
        for index, prompt in enumerate(prompts()):
            driver.add(prompt, NUM_TOKENS)
            if index < 3:
                driver.step()
        driver.run()
        assert driver.blocks.num_used == 0
        return driver


def make_reference(configuration: Configuration, model: nn.Module) -> Reference:
    """Generate the tokens of every prompt with mlx-lm alone."""
    reference = Reference()
    for prompt in prompts():
        cache = make_prompt_cache(model)
        if configuration.cache_window is not None:
            for layer in cache:
                if isinstance(layer, RotatingKVCache):
                    layer.max_size = configuration.cache_window
        tokens = []
        for token, logprobs in generate_step(
            mx.array(prompt), model, max_tokens=NUM_TOKENS, prompt_cache=cache
        ):
            best = mx.sort(logprobs)[-2:].tolist()
            reference.gap = min(reference.gap, best[1] - best[0])
            tokens.append(int(token))
        reference.tokens.append(tokens)
    return reference


def make_specimen(configuration: Configuration) -> Specimen:
    """Build a configuration's model and its reference."""
    model = configuration.build()
    return Specimen(configuration, model, make_reference(configuration, model))


def adapter_of(model: nn.Module) -> dict[str, Matrices]:
    """Return an adapter of all layers that may have one."""
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, LINEARS) and why_not_adapted(name, module) is None:
            outputs, inputs = module.weight.shape
            mx.random.seed(len(name))
            a, b = mx.random.normal((inputs, 2)), mx.random.normal((2, outputs))
            layers[name] = Matrices(0.15 * a, 0.15 * b)
    return layers
