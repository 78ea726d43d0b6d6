"""`python -m pipeline.report`: compare tested runs, on the terminal and on one page. Floor 5."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from pipeline.cli import main
from pipeline.compose import CONF, compose_config
from pipeline.errors import UserError

if TYPE_CHECKING:
    import pandas as pd


def run(cfg: DictConfig, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read runs, print their leaderboard and write it with the rest.

    Returns:
        `out`, the folder, and `rankings`.

    Raises:
        UserError: for bad input, if nothing was tested, and if what was tested on different
            episodes would have to be ranked.
    """
    import pandas as pd

    from pipeline import config, leaderboard, pages, tested
    from pipeline.sections import make_report
    from pipeline.tracking import store
    from pipeline.tracking.read import Reader, without_trials

    config.check_root(cfg, "report")
    reader = Reader()
    study, runs = reader.study(cfg.study) if cfg.study else (None, pd.DataFrame())
    runs = _of_classes(runs, f"study {cfg.study}")
    name = cfg.experiment or OmegaConf.load(CONF / "train.yaml").experiment_name
    if cfg.runs:
        runs, name = reader.runs(cfg.runs), f"{len(cfg.runs)} runs"
    elif cfg.experiment or not cfg.study:
        runs = without_trials(reader.experiment(name))
    title = cfg.study or name
    runs = _of_classes(runs, title)
    wanted = {"data": cfg.test_set} | {k: cfg[k] for k in ("n_way", "k_shot", "episodes")}
    wanted = {k: v for k, v in wanted.items() if v is not None}
    tests = tested.only(tested.collect(runs, reader.results), wanted)
    if tests.empty and not study:
        such = "".join(f" {k}={v}" for k, v in wanted.items())
        raise UserError(f"runs: of {title} none was tested{such and f' on{such}'}")
    tests = tested.with_published(tests, _published())
    rankings = leaderboard.rank(tests, reader.accuracies)
    names = dict(zip(runs["run_id"], runs["name"], strict=True))
    report = make_report(f"Report: {title}", rankings, names, reader.curve, study)
    default = store.MLRUNS / "reports" / re.sub(r"[^\w.\-]+", "_", title)
    out = Path(cfg.out).expanduser().absolute() if cfg.out else default
    try:
        out.mkdir(parents=True, exist_ok=True)
        written = pages.write(report, out)
    except OSError as error:
        raise UserError(f"out: {out} cannot be written ({error.strerror})") from error
    pages.print_report(report)
    print(f"{', '.join(path.name for path in written)} in {out}")
    return {"out": out, "rankings": rankings}


def _of_classes(runs: "pd.DataFrame", title: str) -> "pd.DataFrame":
    """Without the runs whose targets are real; says how many those are."""
    if "tags.measure" not in runs:
        return runs
    real = runs["tags.measure"] == "mse"
    if real.all():
        raise UserError(f"runs: {title} is of real targets (mse); a report ranks accuracies")
    if real.any():
        print(f"{real.sum()} runs of real targets (mse) are left out: a report ranks accuracies")
    return runs[~real]


def _published() -> list[dict[str, Any]]:
    """What conf/experiment states of the literature, each with the backbone that it is of."""
    stated = []
    for path in sorted((CONF / "experiment").glob("*.yaml")):
        cfg = compose_config("train", [f"experiment={path.stem}"])
        rows = [row for row in cfg.published if "accuracy" in row]
        stated += [{**row, "backbone._target_": cfg.backbone._target_} for row in rows]
    return stated


if __name__ == "__main__":
    main("report", run)
