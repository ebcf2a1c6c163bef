from copy import deepcopy

import pytest

from expertoken.evaluation.evaluate import evaluate


@pytest.fixture(scope="session")
def evaluated(trained_once):
    return evaluate(trained_once / "composite")


@pytest.fixture
def report(evaluated):
    """The report of `composite_folder` with everything that stands in one where nothing is said."""
    return deepcopy(evaluated)
