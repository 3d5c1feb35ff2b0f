"""A person at a terminal, or in a browser: run, smoke, launch and the chat page."""
