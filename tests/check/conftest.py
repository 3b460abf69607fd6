from pathlib import Path

import pytest

from tests.check.folders import write_folder


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe in a folder in which everything is right; digests of weights are kept beside it."""
    monkeypatch.setenv("EVERTUNE_HOME", str(tmp_path / "home"))
    return write_folder(tmp_path, tiny_model)
