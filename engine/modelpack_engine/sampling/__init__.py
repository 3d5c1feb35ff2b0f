"""Sampling: `sampler` draws the next tokens of a step, by the stages that `plan` chooses."""
