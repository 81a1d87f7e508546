from pathlib import Path

import pytest

from tests.volumes import make
from trainer.augment.bands import BandStatistics
from trainer.batches import fit_bands


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("heads")
    (folder / "scratch").mkdir()
    return make.dataset(folder / "data", folder / "scratch")


@pytest.fixture(scope="session")
def bands(root: str) -> dict[str, BandStatistics]:
    return fit_bands(make.config(root))
