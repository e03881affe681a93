"""What the tests of the store share."""

from pathlib import Path

import pytest

from pipeline.store.artifacts import Store


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A store on a local folder, and one behind a URI that fsspec serves."""
    return Store(str(tmp_path) if request.param == "local" else f"memory://{tmp_path.name}")
