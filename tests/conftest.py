"""Fixtures that several test folders share."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder with the real expression data, or skip with the reason."""
    folder = Path(os.environ.get("FEDGEX_DATA", ROOT / "../shared/data")).resolve()
    if not (folder / "tcga" / "clinical.csv").is_file():
        pytest.skip(f"no real data: {folder}/tcga/clinical.csv is absent (FEDGEX_DATA)")
    return folder
