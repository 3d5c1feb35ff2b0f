"""Many models: loaded when they are first used, unloaded when they are not, within one budget."""
