"""Every YAML composes, fits its signature and builds; bad values are named with their key."""

import inspect
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

from pipeline import config
from pipeline.compose import compose_config
from pipeline.data.datamodule import EpisodicDataModule
from pipeline.errors import UserError
from pipeline.sources import with_source
from pipeline.trainer import build_trainer_options

CONF = Path(__file__).resolve().parents[1] / "conf"
OPTIONS = [
    f"{group}={path.stem}"
    for group in ("data", "learner", "backbone", "trainer", "experiment")
    for path in sorted((CONF / group).glob("*.yaml"))
]


NEEDED = {
    "data=sinusoid": ["learner=maml", "learner.loss=mse", "backbone=mlp", "backbone.norm=none"]
}
"""What an option does not go without."""


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes_checks_and_builds(option):
    cfg = compose_config("train", [option, *NEEDED.get(option, [])])
    for key in OmegaConf.missing_keys(cfg):
        OmegaConf.update(cfg, key, "/somewhere")
    config.check(cfg)
    data = config.build_data(cfg.data)
    assert data.source.name
    build_trainer_options(cfg)
    assert config.build_learner(cfg, (3, 32, 32)).label


@pytest.mark.parametrize("path", sorted((CONF / "data").glob("*.yaml")), ids=lambda p: p.stem)
def test_a_data_set_and_its_episodes_share_no_key(path):
    """They share one flat node, so a name in both signatures would go to the wrong one."""
    source = hydra.utils.get_class(OmegaConf.load(path)._target_)
    episodic = set(inspect.signature(EpisodicDataModule).parameters)
    assert not set(inspect.signature(source).parameters) & episodic


@pytest.mark.parametrize("group", ["data", "learner", "backbone", "experiment"])
def test_every_option_says_what_it_is_and_how_to_run_it(group):
    for path in (CONF / group).glob("*.yaml"):
        assert "# " in path.read_text().splitlines()[0], path
        if group != "backbone":
            assert "python -m pipeline.train" in path.read_text(), path


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        (["data.n_way=five"], ["data.n_way: found 'five'"]),
        (["data.n_way=1"], ["data.n_way: found 1; Input should be greater than or equal to 2"]),
        (["data.train_k_shot=[1,2,3]"], ["data.train_k_shot: found [1, 2, 3]"]),
        (["data.meta_batch_size=true"], ["data.meta_batch_size: found True"]),
        (["learner=maml", "learner.inner_lr=abc"], ["learner.inner_lr: found 'abc'"]),
        (["learner=maml", "learner.inner_lr=-0.1"], ["learner.inner_lr: found -0.1"]),
        (["learner=maml", "learner.adapted=tail"], ["learner.adapted: found 'tail'"]),
        (["backbone.norm=layer"], ["backbone.norm: found 'layer'; Input should be 'batch',"]),
        (["+learner.bogus=1"], ["learner.bogus: unknown key; allowed are distance"]),
        (["+learner.optimizer.lrr=1"], ["learner.optimizer.lrr: unknown key; allowed are amsgrad"]),
        (
            ["learner.optimizer._target_=torch.optim.Adamm"],
            ["learner.optimizer._target_: 'torch.op"],
        ),
        (["~backbone.width"], ["backbone.width: needs a value"]),
        (["data=image_folder"], ["data.root: needs a value"]),
        (["learner.optimizer.lr=-1"], ["learner.optimizer.lr: found -1; must be greater than 0"]),
        (
            ["data.mean=[0.1,0.2]"],
            ["data.mean: found [0.1, 0.2]; give one number or one a channel"],
        ),
        (
            ["learner=maml", "data.train_n_way=7"],
            ["data.train_n_way: found 7, but Maml is built for"],
        ),
        (
            ["learner=baseline", "data.images_per_batch=null"],
            ["data.images_per_batch: found None, but Transfer trains on images; give a number"],
        ),
        (
            ["data.images_per_batch=8"],
            ["data.images_per_batch: found 8, but ProtoNet trains on episodes; must be null"],
        ),
        (
            ["learner=baseline", "learner.n_train_classes=1"],
            ["learner.n_train_classes: found 1; Input should be greater than or equal to 2"],
        ),
        (["init_from=7"], ["init_from: found 7; Input should be a valid string"]),
        (["init_from=???"], ["init_from: needs a value (none is given)"]),
        (["+trainer.max_stepss=3"], ["trainer.max_stepss: unknown key; allowed are accelerator"]),
        (["+trainer.max_epochs=3"], ["trainer.max_epochs: is set by the pipeline"]),
        (["trainer.max_steps=abc"], ["trainer.max_steps: found 'abc'"]),
        (
            ["trainer.max_steps=250"],
            ["trainer.max_steps: found 250; must be a multiple of the 200"],
        ),
        (["trainer.accumulate_grad_batches=3"], ["data.batches_per_epoch: found 200; must be a"]),
        (
            ["trainer.precision=64-true"],
            ["trainer.precision: found '64-true'; Input should be '32-"],
        ),
        (["test_k_shot=5"], ["test_k_shot: found 5; Input should be a valid list"]),
        (["test_k_shot=[0]"], ["test_k_shot: found [0]; Input should be greater than or equal"]),
        (["seed=-1"], ["seed: found -1"]),
        (["also_test=digits"], ["also_test: found 'digits'; Input should be a valid list"]),
        (["data.n_way=5.0"], ["data.n_way: found 5.0"]),
        (["data.std=[0.0]"], ["data.std: found [0.0]; Input should be greater than 0"]),
        (["data.image_shape=[1,-5,-5]"], ["data.image_shape: found [1, -5, -5]; Input should be"]),
        (["~data.image_size"], ["data.image_size: needs a value"]),
        (["~data.n_way", "data.train_n_way=5"], ["data.n_way: needs a value"]),
        (["+trainer.limit_val_batches=0"], ["trainer.limit_val_batches: is set by the pipeline"]),
        (["published=[{learner:ProtoNet,accuracy:72}]"], ["published: found [{'learner'"]),
        (["data.image_shape=[2,28,28]"], ["data.image_shape: found [2, 28, 28]; channels are"]),
        (["data=image_folder", "data.n_way=five"], ["data.n_way: ", "data.root: needs a value"]),
        (
            ["data.n_way=five", "backbone.norm=layer", "backbone.width=0"],
            ["backbone.norm: ", "backbone.width: ", "data.n_way: "],
        ),
    ],
)
def test_bad_values_are_all_named(overrides, lines):
    with pytest.raises(UserError) as error:
        config.check(compose_config("train", overrides))
    found = sorted(str(error.value).splitlines())
    assert len(found) == len(lines), found
    for line, start in zip(found, sorted(lines), strict=True):
        assert line.startswith(start)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["+learner.optimizer.weight_decay=-1"], r"learner\.optimizer, .*: Invalid weight_decay"),
        (["learner.optimizer._partial_=false"], r"ProtoNet: Adam.* missing .*params"),
        (
            ["learner.optimizer._target_=torch.nn.ReLU", "~learner.optimizer.lr"],
            r"learner\.optimizer, .*: ReLU is not an Optimizer",
        ),
        (
            [
                "learner.scheduler._target_=torch.optim.lr_scheduler.StepLR",
                "~learner.scheduler.T_max",
            ],
            r"learner\.optimizer, learner\.scheduler: .*step_size",
        ),
        (
            ["learner=reptile", "learner.inner_optimizer.betas=[2.0,0.9]"],
            r"learner\.inner_optimizer: Invalid beta",
        ),
        (
            ["backbone=torchvision", "backbone.name=vit_b_16"],
            r"backbone: TorchvisionBackbone does not take images of 3x32x32 .*data\.image_shape",
        ),
    ],
)
def test_what_constructors_refuse_is_one_line(overrides, line):
    cfg = compose_config("train", overrides)
    config.check(cfg)
    with pytest.raises(UserError, match=line):
        config.build_learner(cfg, (3, 32, 32))


def test_a_plateau_is_one_of_validation():
    name = "learner.scheduler._target_=torch.optim.lr_scheduler.ReduceLROnPlateau"
    cfg = compose_config("train", [name, "~learner.scheduler.T_max"])
    config.check(cfg)
    scheduler = config.build_learner(cfg, (3, 32, 32)).configure_optimizers()["lr_scheduler"]
    assert (scheduler["interval"], scheduler["monitor"]) == ("epoch", "val/loss")


def test_a_device_that_is_not_there():
    cfg = compose_config("train", ["trainer.accelerator=tpu"])
    config.check(cfg)
    with pytest.raises(UserError, match=r"trainer: .*torch_xla"):
        build_trainer_options(cfg)


def test_as_many_processes_as_were_started(monkeypatch):
    two = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    cfg = compose_config("train", two)
    assert build_trainer_options(cfg)["devices"] == 2
    cfg.data.val_episodes = 1
    with pytest.raises(UserError, match=r"data\.val_episodes: found 1; .* the 2 processes"):
        build_trainer_options(cfg)
    every = compose_config("train", [*two[:2], "trainer.devices=auto"])
    assert build_trainer_options(every)["devices"] == 1  # of CPUs Lightning takes one
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "3")
    with pytest.raises(UserError, match=r"trainer\.devices, .*: found 1 and 1, but 3 processes"):
        build_trainer_options(every)


def test_another_source_keeps_the_episodes():
    cfg = compose_config("train", ["data.n_way=3"])
    other = compose_config("train", ["data=digits", "data.n_way=7"])
    merged = with_source(cfg.data, other.data, [1, 28, 28])
    assert merged._target_.endswith("Digits")
    assert merged.n_way == 3
    assert list(merged.image_shape) == [1, 28, 28]
