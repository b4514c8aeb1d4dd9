"""Tests; importing them makes the type checker of `tests.typecheck` known."""

from tests import typecheck

__all__ = ["typecheck"]
