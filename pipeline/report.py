"""`python -m pipeline.report`: compare tested runs, on the terminal and on one page. Floor 5."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from pipeline.cli import main
from pipeline.compose import compose_config, experiments
from pipeline.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from pipeline.leaderboard import Ranking
    from pipeline.pages import Section
    from pipeline.tracking.read import Reader, Study

_FILTERS = {"test_set": "data", "n_way": "n_way", "k_shot": "k_shot", "episodes": "episodes"}


def run(cfg: DictConfig, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read runs, print their leaderboard and write it with the rest.

    Returns:
        `out`, the folder, and `rankings`.

    Raises:
        UserError: for bad input, if nothing was tested, and if what was tested on different
            episodes would have to be ranked.
    """
    import pandas as pd

    from pipeline import config, leaderboard, pages
    from pipeline.plots import colours, differences_figure
    from pipeline.tracking import store
    from pipeline.tracking.read import Reader, without_trials

    config.check_root(cfg, "report")
    reader = Reader()
    study = None
    runs = pd.DataFrame()
    if cfg.study:
        study, runs = reader.study(cfg.study)
    if cfg.runs:
        runs = reader.runs(cfg.runs)
    elif cfg.experiment or not cfg.study:
        name = cfg.experiment or compose_config("train", []).experiment_name
        runs = without_trials(reader.experiment(name))
    tests = leaderboard.collect(runs, reader.results)
    tests = _filtered(tests, cfg) if len(tests) else tests
    if tests.empty and not study:
        raise UserError("runs: none of them was tested; train and evaluate leave what is reported")
    if len(tests):
        _add_published(tests, runs)
    rankings = leaderboard.rank(tests, reader.accuracies) if len(tests) else []
    title = cfg.study or (cfg.runs and f"{len(runs)} runs") or name
    colour = colours([label for ranking in rankings for label in ranking.rows["label"]])
    sections = _run_sections(rankings, runs, reader, colour)
    report = pages.Report(
        title=f"Report: {title}",
        rankings=rankings,
        differences=[
            differences_figure(r.rows, colour) if len(r.pairs) else None for r in rankings
        ],
        sections=sections + (_study_sections(study) if study else []),
    )
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
