"""`python -m pipeline.register`: a meta-learner as a model that adapts when asked. Floor 5."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from pipeline.cli import main
from pipeline.errors import UserError
from pipeline.train import quieten


def run(cfg: DictConfig, overrides: Sequence[str] = ()) -> str:
    """Register a learner, as a model of its run or, if it has none, of a new one.

    Returns:
        The URI of the new version.

    Raises:
        UserError: for bad input, or if the store does not take it.
    """
    quieten()
    from pipeline import config
    from pipeline.tracking.models import log_learner
    from pipeline.tracking.run import existing_run, tracked_run
    from pipeline.trained import given_learner, save_learner

    config.check_root(cfg, "register")
    given = given_learner(cfg)
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    settings = {str(key): value for key, value in plain.items()}
    new = tracked_run(cfg.experiment_name, cfg.name, settings, given.provenance, resume=None)
    with tempfile.TemporaryDirectory() as folder, existing_run(cfg.run) if cfg.run else new as kept:
        file = Path(folder) / "learner.pt"
        save_learner(given, file)
        uri = log_learner(kept, given, file, cfg.name, cfg.alias)
    if uri is None:
        raise UserError(f"name: {cfg.name} is not registered; the line above says why")
    handle = f"models:/{cfg.name}@{cfg.alias}" if cfg.alias else uri
    print(f"{uri}: {given.learner.label}, {given.learner.protocol}")
    print(f'mlflow.pyfunc.load_model("{handle}").predict(table of image and label)')
    return uri


if __name__ == "__main__":
    main("register", run)
