"""Models as directories that a runtime opens; start with `bundle.lay_out`."""
