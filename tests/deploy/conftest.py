"""The small tokenizer of the router's tests, for commands that talk to a router."""

from tests.router.conftest import model_directory

__all__ = ["model_directory"]
