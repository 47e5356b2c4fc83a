"""Fixtures of the model tests."""

from tests.model.conftest import oracles

__all__ = ["oracles"]
