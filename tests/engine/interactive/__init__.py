"""Interactive use in a terminal or a browser: run, smoke, launch and the chat page."""
