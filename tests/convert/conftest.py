"""What the tests of wrong input need."""

import jaxtyping
import pytest


@pytest.fixture
def unhooked():
    """The package as a user has it: under pytest jaxtyping would refuse wrong types before our own rules do."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
