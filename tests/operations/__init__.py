"""Tests of the operations through their Python interface."""
