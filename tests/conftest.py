"""Finished runs that several files read."""

import pytest

from runs import SMOKE, Finished, completed


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """`experiment=smoke` from an empty store, which stands in its folder."""
    return completed(tmp_path_factory.mktemp("smoke"), *SMOKE)
