"""LoRA adapters in the engine."""
