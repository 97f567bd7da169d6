"""The checkpoint under test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.register_assert_rewrite("rows")


@pytest.fixture
def candidate() -> Callable[..., Any]:
    """`keepless.checkpoint`, looked up when a test runs."""
    import keepless

    return keepless.checkpoint
