"""Finished runs that several files read."""

from pathlib import Path

import pytest

from runs import SMOKE, TINY, Finished, completed


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """`experiment=smoke` from an empty store, which stands in its folder."""
    return completed(tmp_path_factory.mktemp("smoke"), *SMOKE)


@pytest.fixture(scope="session")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a demo, and a sweep of two points, have run: what the pages take for granted."""
    folder = tmp_path_factory.mktemp("started")
    completed(folder, *TINY, "name=demo")
    completed(folder, "-m", *TINY, "name=grid", "dpo.loss.beta=0.5,1")
    return folder
