"""What a report shows beside its tables: pictures of runs and of a sweep. Floor 4."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from pipeline.leaderboard import Ranking
from pipeline.plots import (
    colours,
    curves_figure,
    differences_figure,
    history_figure,
    importance_figure,
    shots_figure,
    slices_figure,
)
from pipeline.tested import FLOOR

if TYPE_CHECKING:
    from pipeline.tracking.read import Study

Curve = Callable[[str, str], pd.Series]
"""From the id of a run and a metric: its values by step."""


class Section(NamedTuple):
    """Pictures under one heading; `text` says what is seen."""

    title: str
    text: str
    figures: Sequence[Any]


class Report(NamedTuple):
    """What is written; `differences` has a picture for each ranking, None where nothing pairs."""

    title: str
    rankings: Sequence[Ranking]
    differences: Sequence[Any]
    sections: Sequence[Section]


def make_report(
    title: str, rankings: Sequence[Ranking], names: Mapping[str, str], curve: Curve,
    study: "Study | None",
) -> Report:  # fmt: skip
    """Draw what rankings, curves and a sweep have to show.

    Args:
        names: of runs, by id.
    """
    colour = colours([label for r in rankings for label in r.rows["label"]])
    pictures = [_differences(ranking.rows, colour) for ranking in rankings]
    sections = [_shots(rankings, colour), *_curves(rankings, names, curve, colour)]
    if study:
        sections.append(_study(study))
    return Report(title, rankings, pictures, [s for s in sections if s.figures])


def _differences(rows: pd.DataFrame, colour: Mapping[str, str]) -> Any:
    """Without the pixel floor, far from which all others are one point."""
    drawn = rows[rows["to_best"].notna() & (rows["label"] != FLOOR)]
    return differences_figure(drawn, colour) if len(drawn) else None


def _shots(rankings: Sequence[Ranking], colour: Mapping[str, str]) -> Section:
    panels: dict[str, list[pd.DataFrame]] = {}
    for ranking in rankings:
        title = f"{ranking.data}, {ranking.n_way}-way, {ranking.protocol}"
        panels.setdefault(title, []).append(ranking.rows.assign(k_shot=ranking.k_shot))
    several = {k: pd.concat(v, ignore_index=True) for k, v in panels.items() if len(v) > 1}
    text = "Accuracy with its interval, as in the leaderboard, at each number of labelled images."
    figures = [shots_figure(several, colour)] if several else []
    return Section("Accuracy against shots", text, figures)


def _curves(
    rankings: Sequence[Ranking], names: Mapping[str, str], curve: Curve, colour: Mapping[str, str]
) -> list[Section]:
    """Curves of training and of adaptation, a line a run."""
    runs = {
        run_id: row.label
        for ranking in rankings
        for row in ranking.rows.itertuples()
        for run_id in row.runs.split()
        if row.label != FLOOR  # untrained, it stands with the curves of no run
    }

    def lines(metric: str) -> list[tuple[str, str, pd.Series]]:
        each = [(label, names[run_id], curve(run_id, metric)) for run_id, label in runs.items()]
        return [line for line in each if len(line[2])]

    training = {name: lines(name) for name in ("val/acc", "train/loss")}
    steps = {"accuracy on test episodes": lines("adapt/acc_at_step")}
    return [
        Section(
            "Training curves",
            "Accuracy on the validation classes and training loss against steps of the outer "
            "optimiser; learners differ in the number of tasks a step. A line is a run.",
            [curves_figure(training, "training step", colour)] if any(training.values()) else [],
        ),
        Section(
            "Adaptation steps",
            "Accuracy of gradient learners on some hundred test episodes after each number of "
            "inner steps. It selects nothing: learners are tested at the number in their "
            "configuration.",
            [curves_figure(steps, "inner step", colour)] if any(steps.values()) else [],
        ),
    ]


def _study(study: "Study") -> Section:
    states = study.trials["state"].str.lower().value_counts()
    counts = ", ".join(f"{n} {state}" for state, n in states.items())
    figures = []
    if study.trials["value"].notna().any():
        figures = [history_figure(study.trials), slices_figure(study.trials)]
    if study.importance:
        figures.append(importance_figure(study.importance))
    text = (
        f"{len(study.trials)} trials ({counts}): validation accuracy of each, the same against "
        "each parameter, and how much each parameter matters. Trials are never tested."
    )
    return Section("Sweep", text, figures)
