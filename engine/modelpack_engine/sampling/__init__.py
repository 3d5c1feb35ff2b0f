"""The parts of sampling: what a step uploads, what it does to logits, how it draws."""
