from copy import deepcopy

import pytest

from expertoken.evaluation.evaluate import evaluate


@pytest.fixture(scope="session")
def evaluated(trained_once):
    return evaluate(trained_once / "composite")


@pytest.fixture
def report(evaluated):
    """Return a copy of the report of `composite_folder` with default arguments."""
    return deepcopy(evaluated)
