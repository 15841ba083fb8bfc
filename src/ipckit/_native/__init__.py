"""The compiled core; its contract is in `__init__.pyi`."""

from ._core import *  # noqa: F403
