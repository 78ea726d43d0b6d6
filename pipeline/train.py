"""`python -m pipeline.train`: fit, keep what validates best, test it once. Floor 5."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import DictConfig, OmegaConf

from pipeline.cli import main
from pipeline.errors import UserError
from pipeline.processes import end_others

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from pipeline.data.loaders import EpisodeLoaders
    from pipeline.tracking.run import Run


def run(
    cfg: DictConfig,
    overrides: Sequence[str] = (),
    callbacks: "Sequence[pl.Callback]" = (),
    tags: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Train as configured, track it in MLflow, print the closing table.

    Args:
        cfg: a composed `conf/train.yaml`.
        overrides: what it was composed with; matters for `resume`, which starts from the stored
            configuration and applies them again.
        callbacks: further ones for the trainer; its logger knows the run.
        tags: further ones for the run.

    Returns:
        `run_id` and the test metrics, accuracies in 0..1 (with `test=false` the best `val/acc`,
        or `val/mse`, alone); nothing in further processes (DDP).

    Raises:
        UserError: for bad input, before anything is computed.
    """
    quieten()
    import pytorch_lightning as pl
    from pytorch_lightning.utilities import rank_zero_only

    from pipeline import checkpoints, config, reporting
    from pipeline.engine import keep_freed_memory
    from pipeline.scoreboard import make_test_sets, other_sources
    from pipeline.seen import refuse_seen, seen_by
    from pipeline.tracking.run import NoRun, tracked_run
    from pipeline.tracking.store import find_checkpoint
    from pipeline.trainer import build_trainer_options

    resume = cfg.resume
    last = find_checkpoint(resume, "last") if resume else None
    if last:
        cfg = checkpoints.restore_config(last, overrides)
    config.check(cfg)
    start = _find_start(cfg.init_from) if cfg.init_from and not last else None
    options = build_trainer_options(cfg)
    others = other_sources(cfg.also_test or [])
    data = config.build_data(cfg.data)
    data.setup("fit" if "optimizer" in cfg.learner else "test")
    _count_classes(cfg, data)
    sets = make_test_sets(cfg, data, others, cfg.test_k_shot) if cfg.test else []
    seen = [seen_by(data)]
    if earlier := last or start:
        before = checkpoints.stored_seen(earlier)
        if last and not seen[0].same_as(before[0]):
            raise UserError(f"resume: {data.source.name} is not what it was when {resume} began")
        seen += before[1:] if last else [each for each in before if each != seen[0]]
    refuse_seen(seen, sets)
    main_set = next((t for t in sets if t.k_shot == data.k_shot), sets[0] if sets else None)
    keep_freed_memory()
    pl.seed_everything(cfg.seed, verbose=False)
    learner = config.build_learner(cfg, data.image_shape, pretrained=not resume)
    started = checkpoints.start_from(learner, start) if start else ""
    if cfg.compile:
        learner.compile_networks()

    network = config.backbone_label(cfg)
    resolved = _resolved(cfg, data.image_shape, options["devices"])
    facts = {
        "seed": cfg.seed,
        "data.fingerprint": seen[0].fingerprint,
        "measure": data.measure,
        "protocol": learner.protocol,
        "learner": learner.label,
        "data": data.source.name,
        "device": _device_name(options.get("accelerator", "auto")),
    }
    first = getattr(rank_zero_only, "rank", 0) == 0
    if started and first:
        print(started)
    name = cfg.run_name or f"{learner.label} {data.source.name}"
    run = tracked_run(cfg.experiment_name, name, resolved, {**facts, **(tags or {})}, resume)
    with run if first else nullcontext(NoRun()) as tracked:
        reporting.log_datasets(tracked, data, sets)
        step = 0
        if "optimizer" in cfg.learner:
            provenance = checkpoints.Provenance(resolved, seen)
            best_before = partial(find_checkpoint, resume, "best")
            extra = [provenance, *callbacks]
            best, score = _fit(learner, data, options, extra, tracked, last, best_before)
        if not first:
            return {}
        if "optimizer" in cfg.learner:
            step = checkpoints.load_weights(learner, best)
            tracked.log_metrics({f"val/best_{data.measure}": score}, step)
            if not cfg.test:
                name = f"val/{data.measure}"
                print(f"best {name} {score:.4f} after step {step}; {tracked.where()}")
                return {"run_id": tracked.run_id, name: score}
        return reporting.test_and_report(
            tracked, learner, sets, network, cfg.published, step, main_set, "results.csv", inside=0
        )


def _find_start(init_from: str) -> Path:
    """The checkpoint that `init_from` names."""
    from pipeline.tracking.store import find_checkpoint

    if Path(init_from).is_file():
        return Path(init_from)
    try:
        return find_checkpoint(init_from, "best")
    except UserError as error:
        raise UserError(f"init_from: {str(error).removeprefix('run: ')}") from error


def _count_classes(cfg: DictConfig, data: "EpisodeLoaders") -> None:
    """Put the number of training classes where the learner asks for it, once for all."""
    if "n_train_classes" not in cfg.learner:
        return
    found, classes = cfg.learner.n_train_classes, len(data.class_names("train"))
    if found not in (None, classes):
        raise UserError(
            f"learner.n_train_classes: found {found}, but {data.source.name} has {classes} "
            "training classes; null takes their number"
        )
    cfg.learner.n_train_classes = classes


def _resolved(cfg: DictConfig, image_shape: Sequence[int], devices: Any) -> dict[str, Any]:
    """What is stored with the run: it holds in another working directory and machine too."""
    resolved = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
    if "image_shape" in resolved["data"]:
        resolved["data"]["image_shape"] = list(image_shape)
    resolved["trainer"]["devices"] = devices
    if (start := resolved["init_from"]) and Path(start).is_file():
        resolved["init_from"] = os.path.abspath(start)
    others = [spec for spec in resolved["also_test"] or [] if isinstance(spec, dict)]
    for node in (resolved["data"], *others):
        for key in ("root", "split_file"):
            if path := node.get(key):
                node[key] = os.path.abspath(Path(path).expanduser())
    return resolved


def _fit(
    learner: "pl.LightningModule",
    data: "EpisodeLoaders",
    options: dict[str, Any],
    callbacks: "Sequence[pl.Callback]",
    tracked: "Run",
    start: Path | None,
    best_before: Callable[[], Path],
) -> tuple[Path, float]:
    """Fit with Lightning, from a last checkpoint or from scratch; the learner stays on its device.

    Args:
        best_before: finds the best checkpoint of a run that goes on.

    Returns:
        Path of the checkpoint with the best val/acc (or val/mse), and that.
    """
    import pytorch_lightning as pl
    from pytorch_lightning.callbacks import ModelCheckpoint

    from pipeline.annotations import better
    from pipeline.checkpoints import bring
    from pipeline.progress import RunLogger, progress_callbacks

    folder = tracked.checkpoint_dir
    keep = partial(
        ModelCheckpoint,
        dirpath=folder,
        save_on_train_epoch_end=True,  # at an epoch's end the episode stream goes on cleanly
        enable_version_counter=False,
    )
    score, mode = f"val/{data.measure}", better(data.measure)
    best, last = keep(filename="best", monitor=score, mode=mode), keep(filename="last")
    if start and tracked.run_id:  # no later checkpoint may be better than the best one so far
        bring(best_before(), folder / "best.ckpt")
    logger = RunLogger(tracked)
    trainer = logger.trainer = pl.Trainer(
        **options,
        logger=logger,
        callbacks=[best, last, *callbacks, *progress_callbacks()],
        enable_model_summary=False,
        enable_progress_bar=sys.stdout.isatty(),
        use_distributed_sampler=False,  # the data module deals the episodes itself
        num_sanity_val_steps=0,
        max_epochs=-1,
    )
    try:
        trainer.fit(learner, data, ckpt_path=start, weights_only=True)
    except BaseException as stop:
        end_others(trainer)
        if isinstance(stop, SystemExit):  # what Lightning makes of Ctrl-C
            raise KeyboardInterrupt from stop
        raise
    learner.to(trainer.strategy.root_device)  # Lightning leaves it on the CPU
    if not best.best_model_path or best.best_model_score is None:
        raise UserError("trainer: training ended before its first validation; nothing was tested")
    return Path(best.best_model_path), float(best.best_model_score)


def _device_name(accelerator: str) -> str:
    import torch

    use_gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return torch.cuda.get_device_name() if use_gpu else f"cpu ({torch.get_num_threads()} threads)"


def quieten() -> None:
    """Keep the tips and notices of libraries out of a user's terminal."""
    import logging
    import warnings

    for name in ("pytorch_lightning", "pytorch_lightning.utilities.rank_zero", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    harmless = ["does not have many workers", "LeafSpec", "logging interval", "exists and is not"]
    harmless += ["IProgress not found"]  # tqdm in a notebook without ipywidgets
    harmless += ["could not find the monitored key"]  # a resumed run first ends its last epoch
    harmless += ["in eval mode at the start of training"]  # frozen stages are
    harmless += ["recommended to use `self.log"]  # EpisodeMean gathers over processes itself
    for text in (f".*{part}.*" for part in harmless):
        warnings.filterwarnings("ignore", message=text)


if __name__ == "__main__":
    main("train", run)
