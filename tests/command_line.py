"""The type of the fixture `run_cli`, for tests that use it."""

from collections.abc import Callable

RunCli = Callable[..., tuple[int, str, str]]
"""Takes the arguments of the console script; returns exit code, stdout and stderr."""
