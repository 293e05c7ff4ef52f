import jaxtyping
import pytest


@pytest.fixture
def unchecked_types():
    """Shape annotations off, as they are for users."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
