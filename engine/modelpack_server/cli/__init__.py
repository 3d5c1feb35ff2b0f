"""The commands that need the engine or a running server; registered as entry points."""
