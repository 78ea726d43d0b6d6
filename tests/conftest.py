"""Fixtures that several test files share."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from mlflow import MlflowClient

from pipeline import tracking

torch.set_num_threads(1)  # the nets here are tiny: a second thread only waits


@pytest.fixture(scope="session")
def fresh_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without runs; making one takes seconds, copying it none."""
    folder = tmp_path_factory.mktemp("database")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setattr(tracking, "MLRUNS", folder)
        tracking.connect()
    return folder / "mlflow.db"


@pytest.fixture
def store(fresh_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tracking store of the test's own."""
    folder = tmp_path / "mlruns"
    folder.mkdir()
    shutil.copy(fresh_database, folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(tracking, "MLRUNS", folder)
    return folder


def stored_table(client: MlflowClient, run_id: str) -> pd.DataFrame:
    """results.json of a run, as the MLflow UI reads it: the tag names it, the file holds it."""
    tag = client.get_run(run_id).data.tags["mlflow.loggedArtifacts"]
    assert {"path": "results.json", "type": "table"} in json.loads(tag)
    content = json.loads(Path(client.download_artifacts(run_id, "results.json")).read_text())
    return pd.DataFrame(content["data"], columns=content["columns"])
