"""Fixtures that several test files share."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from pipeline.data.datamodule import EpisodicDataModule
from pipeline.data.pool import ImagePool, ImageSource, SplitPool
from pipeline.tracking import store

if TYPE_CHECKING:  # tests/ddp_worker.py starts faster without them
    import pandas as pd
    from mlflow import MlflowClient

torch.set_num_threads(1)  # the nets here are tiny: a second thread only waits


@pytest.fixture(scope="session")
def fresh_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without runs; making one takes seconds, copying it none."""
    folder = tmp_path_factory.mktemp("database")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setattr(store, "MLRUNS", folder)
        store.connect()
    return folder / "mlflow.db"


@pytest.fixture
def runs_folder(fresh_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tracking store of the test's own."""
    folder = tmp_path / "mlruns"
    folder.mkdir()
    shutil.copy(fresh_database, folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(store, "MLRUNS", folder)
    return folder


def stored_table(client: "MlflowClient", run_id: str) -> "pd.DataFrame":
    """results.json of a run, as the MLflow UI reads it: the tag names it, the file holds it."""
    import pandas as pd

    tag = client.get_run(run_id).data.tags["mlflow.loggedArtifacts"]
    assert {"path": "results.json", "type": "table"} in json.loads(tag)
    content = json.loads(Path(client.download_artifacts(run_id, "results.json")).read_text())
    return pd.DataFrame(content["data"], columns=content["columns"])


class BlobSource:
    """A data set for tests: every class a random template, every image that template plus noise."""

    name = "blobs"

    def __init__(self, classes: int = 18, images: int = 20, shape: tuple[int, ...] = (1, 10, 10)):
        rng = np.random.default_rng(0)
        templates = rng.uniform(0, 255, size=(classes, 1, *shape))
        noisy = templates + rng.normal(0, 40, size=(classes, images, *shape))
        self.images = noisy.clip(0, 255).astype(np.uint8).reshape(-1, *shape)
        self.labels = np.repeat(np.arange(classes), images)
        self.names = [f"blob {i}" for i in range(classes)]

    def load(self) -> SplitPool:
        """Half of the classes train, a quarter each validates and tests."""
        half, quarter = len(self.names) // 2, len(self.names) // 4
        splits = {
            "train": self.names[:half],
            "val": self.names[half : half + quarter],
            "test": self.names[half + quarter :],
        }
        return SplitPool(ImagePool.from_arrays(self.images, self.labels, self.names), splits)


def blob_data(source: ImageSource | None = None, **changes: object) -> EpisodicDataModule:
    """Episodes of `BlobSource`: 3-way 2-shot 4-query, two tasks a step."""
    options = {
        "n_way": 3, "k_shot": 2, "n_query": 4, "train_n_way": 3, "train_k_shot": 2,
        "train_n_query": 4, "meta_batch_size": 2, "batches_per_epoch": 4, "val_episodes": 5,
        "test_episodes": 7, "seed": 0, "eval_seed": 0, "mean": [0.5], "std": [0.25],
        "augmentation": None, "num_workers": 0,
    }  # fmt: skip
    return EpisodicDataModule(source or BlobSource(), **(options | changes))
