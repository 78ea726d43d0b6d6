"""One process of a DDP run, as torchrun starts it; what it saw goes to FOLDER/CASE_RANK.pt."""

import os
import sys
from pathlib import Path

import torch
from pytorch_lightning.callbacks import Callback

from pipeline import config, train
from pipeline.compose import compose_config
from pipeline.data.transforms import Augmentation
from pipeline.tracking.run import NoRun
from pipeline.trainer import build_trainer_options
from tests.conftest import blob_data

CASES = {
    "maml": ["learner=maml"],
    "protonet": ["learner=protonet", "backbone.norm=group"],
    "reptile": ["learner=reptile", "learner.eval_inner_steps=3"],
    "images": ["learner=simple_shot", "backbone.norm=group", "learner.n_train_classes=9"],
    "running statistics": ["learner=protonet"],
}
TASKS = 4  # or images, a step, over all processes
SHAPE = {"n_way": 3, "train_n_way": 3, "val_episodes": 33, "batches_per_epoch": 4}
"""33 validation episodes: 17 and 16, which without care are two batches and one."""
OPTIONS = [
    "trainer.accelerator=cpu",
    "trainer.max_steps=8",
    "trainer.log_every_n_steps=1",
    "backbone.width=4",
    "backbone.downsample=stride",
    *(f"data.{key}={value}" for key, value in SHAPE.items()),
]


class Kept(NoRun):
    """Keeps the curves; {name: {step: value}}."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.checkpoint_dir, self.curves = folder, {}

    def log_metrics(self, values, step):
        for name, value in values.items():
            self.curves.setdefault(name, {})[step] = float(value)


class Ids(Callback):
    """Which episodes this process was given: [[ids] a step], [[ids] a validation]."""

    def __init__(self) -> None:
        self.train, self.val = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.train.append(batch.id.tolist())

    def on_validation_epoch_start(self, trainer, pl_module):
        self.val.append([])

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.val[-1] += batch.id.tolist()


def fit(case: str, processes: int, folder: Path) -> dict:
    """Train a small learner in float64, in which a sum in another order differs by 1e-16."""
    trainer = ["trainer=ddp", f"trainer.devices={processes}"] if processes > 1 else []
    cfg = compose_config("train", [*CASES[case], *trainer, *OPTIONS])
    config.check(cfg)
    torch.manual_seed(0)
    augmentation = Augmentation(affine=0.1, crop_padding=1, flip=True, jitter=0.2)
    size = "images_per_batch" if case == "images" else "meta_batch_size"
    data = blob_data(**{size: TASKS // processes}, augmentation=augmentation, **SHAPE)
    as_float, data.prepare = data.prepare, lambda images: as_float(images).double()
    learner = config.build_learner(cfg, data.image_shape).double()
    options = build_trainer_options(cfg)
    run, ids = Kept(folder), Ids()
    train._fit(learner, data, options, [ids], run, None, None)
    weights = learner.state_dict()
    return {"curves": run.curves, "train": ids.train, "val": ids.val, "weights": weights}


if __name__ == "__main__":
    train.quieten()
    for name in CASES:
        seen = fit(name, int(os.environ["WORLD_SIZE"]), Path(sys.argv[1]) / name)
        torch.save(seen, Path(sys.argv[1]) / f"{name}_{os.environ['RANK']}.pt")
