"""Fixtures of the tests of adapters."""

from tests.engine.zoo.conftest import uncompiled as uncompiled
