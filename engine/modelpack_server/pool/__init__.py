"""Many models in one memory budget: loaded on first use, unloaded when idle. Read `pool` first."""
