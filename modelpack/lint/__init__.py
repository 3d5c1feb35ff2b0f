"""Checks for the models of a catalogue: `policy` configures the rules, `checks` has the checks."""
