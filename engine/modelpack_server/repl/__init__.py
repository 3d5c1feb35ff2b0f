"""The interactive chat of `modelpack run`: read lines, send them to a model, show the reply."""

#: The sampling temperature if neither the user nor the model sets one.
DEFAULT_TEMPERATURE = 0.7
