"""The interactive chat of `modelpack run`: read lines, send them to a model, show the reply."""
