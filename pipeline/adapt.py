"""`python -m pipeline.adapt`: from a folder of photos to a classifier. Floor 5."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from pipeline.cli import main
from pipeline.errors import UserError
from pipeline.train import quieten


def run(cfg: DictConfig, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Adapt a learner to photos, estimate its accuracy, classify further photos, and keep it all.

    What is computed is written to `out` first, and then tracked in MLflow.

    Returns:
        `run_id`, `out`, `accuracy` estimated by held-out photos (nan if there are none), and of
        labelled queries `query_accuracy`; accuracies in 0..1.

    Raises:
        UserError: for bad input.
    """
    quieten()
    import torch

    from pipeline import config
    from pipeline.adapted import Adapted
    from pipeline.classifier import PhotoClassifier
    from pipeline.data.photos import read_queries, read_support
    from pipeline.engine import keep_freed_memory
    from pipeline.progress import scoring
    from pipeline.tracking import store
    from pipeline.tracking.models import log_photo_classifier
    from pipeline.tracking.run import tracked_run
    from pipeline.trained import given_learner

    config.check_root(cfg, "adapt")
    if cfg.out:
        _made(Path(cfg.out))  # or all that follows would be for nothing
    given = given_learner(cfg)
    channels, side, _ = given.photo_shape
    support = read_support(Path(cfg.support), channels, side, cfg.skip_bad)
    names = support.class_names
    query = None
    if cfg.query is not None:
        query = read_queries(Path(cfg.query), channels, side, cfg.skip_bad, names)
    keep_freed_memory()
    assert support.labels is not None
    photos = torch.from_numpy(support.images), torch.from_numpy(support.labels)
    classifier = PhotoClassifier(given, *photos, names, cfg.reject)
    classifier.to("cuda" if torch.cuda.is_available() else "cpu")
    with scoring("photos") as begin:
        estimate = classifier.calibrate(begin("left out in turn", len(support.paths)))
        said = None
        if query:
            said = classifier.predict(query.images, begin("classified", len(query.paths)))
    adapted = Adapted(classifier, support, estimate, query, said)
    facts = {**given.provenance, "classes": len(names), "photos": len(support.paths)}
    label = f"{Path(cfg.support).expanduser().absolute().name} {given.learner.label}"
    plain = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
    with tracked_run(cfg.experiment_name, label, plain, facts, resume=None) as tracked:
        out = _made(Path(cfg.out) if cfg.out else store.MLRUNS / "classifiers" / tracked.run_id)
        files = adapted.write(out)
        adapted.say()
        adapted.export(out, cfg.export)
        adapted.track(tracked, files)
        file = out / "classifier.pt"
        model = log_photo_classifier(tracked, classifier, file, estimate, cfg.name, cfg.alias)
        if model and cfg.name:
            moved = f", models:/{cfg.name}@{cfg.alias}" if cfg.alias else ""
            print(f"registered as {model}{moved}")
        print(f"written to {out}; {tracked.where()}")
    numbers = adapted.numbers()
    return {"run_id": tracked.run_id, "out": out, **numbers}


def _made(folder: Path) -> Path:
    """A folder that can be written to, made if it is not there.

    Raises:
        UserError: if that cannot be.
    """
    folder = folder.expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"out: {folder} cannot be written ({error.strerror})") from error
    return folder


if __name__ == "__main__":
    main("adapt", run)
