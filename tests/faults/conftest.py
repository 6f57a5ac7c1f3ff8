"""Models and rows are those of the end-to-end tests."""

from tests.e2e.conftest import unserved_world

__all__ = ["unserved_world"]
