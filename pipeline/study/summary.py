"""What came of a sweep: table, plots and best values, for its run and the terminal. Floor 5."""

import json
import math
import shlex
from typing import TYPE_CHECKING

import optuna
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.table import Table

from pipeline.study.live import brief
from pipeline.study.settings import Settings
from pipeline.study.storage import shown_url
from pipeline.study.worker import as_override
from pipeline.tracking.run import Run
from pipeline.tracking.study import name_best, view

if TYPE_CHECKING:
    import pandas as pd

SHOWN = 5


def best_trials(study: Study) -> list[FrozenTrial]:
    """The best trial, or with several objectives those that no other beats in all of them."""
    if not any(t.state == TrialState.COMPLETE for t in study.get_trials(deepcopy=False)):
        return []
    return study.best_trials if len(study.directions) > 1 else [study.best_trial]


def to_frame(study: Study, objectives: list[str]) -> "pd.DataFrame":
    """One row a trial: number, state, value (further objectives by name), params_KEY and facts."""
    import pandas as pd

    rows = []
    for trial in study.get_trials(deepcopy=False):
        names = ["value", *objectives[1:]]
        values = dict(zip(names, trial.values or [None] * len(names), strict=True))
        took = trial.duration.total_seconds() if trial.duration else None
        rows.append(
            {"number": trial.number, "state": trial.state.name, **values, "seconds": took}
            | {f"params_{k}": v for k, v in trial.params.items()}
            | {"step": trial.last_step, "run_id": trial.user_attrs.get("run_id"),
               "continues": trial.user_attrs.get("continues"),
               "error": trial.user_attrs.get("error")}
        )  # fmt: skip
    return pd.DataFrame(rows)


def summarise(settings: Settings, study: Study, parent: Run, efficiency: float) -> None:
    """Leave table, plots, importance and best values with the parent run."""
    objectives = list(settings.cfg.objectives)
    frame = to_frame(study, objectives)
    if not len(frame):
        return
    parent.log_text(frame.to_csv(index=False), "study/trials.csv")
    parent.put_table(frame.drop(columns="error").astype(object).where(frame.notna(), None),
                     "study/trials.json")  # fmt: skip
    best = best_trials(study)
    if not best:
        return
    name_best(parent, best[0].params)
    numbers = zip(objectives, best[0].values, strict=True)
    parent.log_metrics({f"best/{k}": v for k, v in numbers}, best[0].number)
    if not math.isnan(efficiency):
        parent.log_metrics({"sweep/efficiency": efficiency}, len(frame))
    overrides = [*settings.overrides, *(as_override(k, v) for k, v in best[0].params.items())]
    parent.log_text("\n".join(overrides) + "\n", "study/best_overrides.txt")
    _history(study, parent, settings.mode)
    if importance := _importance(study):
        parent.log_text(json.dumps(importance, indent=1), "study/importance.json")
    parent.log_text(_plots(settings, study, importance), "study/plots.html")


def _history(study: Study, parent: Run, mode: str) -> None:
    """The best of the first objective after each trial, as a curve of the parent run."""
    pick, found = max if mode == "max" else min, []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        found.append(trial.values[0])
        parent.log_metrics({"best/so_far": pick(found)}, trial.number)


def _importance(study: Study) -> dict[str, float]:
    """Share of each key in what makes the score vary; empty for few trials, or two objectives."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(study.directions) > 1 or len(complete) < 3:
        return {}
    try:
        return optuna.importance.get_param_importances(study)
    except (ValueError, RuntimeError):  # all trials alike, or each of another shape
        return {}


def _plots(settings: Settings, study: Study, importance: dict[str, float]) -> str:
    """One page that needs no network: history, importance, slices, parallel coordinates."""
    from optuna import visualization as draw

    if len(study.directions) > 1:
        names = list(settings.cfg.objectives)
        figures = [draw.plot_pareto_front(study, target_names=names)]
    else:
        figures = [draw.plot_optimization_history(study)]
        if importance:
            figures.append(draw.plot_param_importances(study))
        figures += [draw.plot_slice(study), draw.plot_parallel_coordinate(study)]
        if settings.cfg.pruner in ("hyperband", "median"):
            figures.append(draw.plot_intermediate_values(study))
    parts = [f"<!doctype html><meta charset=utf-8><title>{study.study_name}</title>"]
    for i, figure in enumerate(figures):
        parts.append(figure.to_html(full_html=False, include_plotlyjs=i == 0))
    return "\n".join(parts)


def print_best(settings: Settings, study: Study, url: str, parent: Run, efficiency: float) -> None:
    """The best trials, how to train and to look at them.

    Args:
        efficiency: share of the time that the workers trained in; nan if they did not work now.
    """
    objectives = list(settings.cfg.objectives)
    best = best_trials(study)
    if len(objectives) == 1:
        complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        most = settings.mode == "max"
        best = sorted(complete, key=lambda t: t.values[0], reverse=most)[:SHOWN]
    table = Table(title=f"{settings.name}: best of {settings.cfg.n_trials} trials, by validation",
                  title_justify="left")  # fmt: skip
    for name in ("trial", *objectives, "values"):
        table.add_column(name, justify="left" if name == "values" else "right")
    for trial in best:
        table.add_row(str(trial.number), *(f"{v:.4f}" for v in trial.values), brief(trial.params))
    console = Console()
    console.print(table)
    if best:
        chosen = [as_override(k, v) for k, v in best[0].params.items()]
        print(shlex.join(["python", "-m", "pipeline.train", *settings.overrides, *chosen]))
    if not math.isnan(efficiency):
        print(f"workers were busy {100 * efficiency:.0f} % of the time")
    print(parent.where())
    measure = objectives[0].removeprefix("val/")
    if address := view(parent, [each.key for each in settings.space], measure):
        print(f"its trials: {address}")
    print(f"optuna-dashboard {shown_url(url)}   (pip install optuna-dashboard) shows the study")
