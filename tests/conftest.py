"""Shared fixtures."""

import pytest
from op_backends import BACKENDS


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Every back end that can run here."""
    return str(request.param)
