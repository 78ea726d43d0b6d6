"""From results to the closing table, its metrics and its terminal form. Floor 4."""

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from pipeline.annotations import Measure
from pipeline.learners.base import MetaLearner
from pipeline.scoreboard import FixedEpisodes, Result, is_own, task_name, with_steps


def to_frame(results: Iterable[Result], published: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row a result; accuracy and its ci95 in percent, or mse and its ci95.

    Args:
        published: values of the literature, see `annotations.Published` and `PublishedError`; shown
            beside the row that they match.
    """
    rows = []
    for result in results:
        test, measure = result.test, result.scores.measure
        shown: dict[str, Any]
        mean, ci95 = result.scores.interval()
        if measure == "acc":
            name, shown = "accuracy", {"accuracy": round(100 * mean, 2)}
            shown["ci95"] = round(100 * ci95, 2)
        else:
            name, shown = "mse", {"inner_steps": result.steps, "mse": round(mean, 4)}
            shown["ci95"] = round(ci95, 4)
        beside = [p for p in published if _is_of(p, result, name)]
        rows.append(
            {
                "learner": result.learner,
                "data": test.name,
                "n_way": test.n_way,
                "k_shot": test.k_shot,
                "n_query": test.n_query,
                **shown,
                "episodes": test.episodes,
                "protocol": result.protocol,
                "published": beside[0][name] if beside else math.nan,
                "published_source": beside[0]["source"] if beside else "",
                "backbone": result.backbone,
                "parameters": result.parameters,
                "adapt_ms": round(1000 * result.adapt_seconds, 3),
                "episode_list": result.scores.episode_list[:16],
            }
        )
    frame = pd.DataFrame(rows)
    return frame.astype({"inner_steps": "Int64"}) if "inner_steps" in frame else frame


def _is_of(published: Mapping[str, Any], result: Result, name: str) -> bool:
    """Whether a published value is one of this learner and task, by the same measure."""
    row = {"learner": result.learner, "data": result.test.name, "k_shot": result.test.k_shot}
    row |= {"n_way": result.test.n_way} if name == "accuracy" else {"inner_steps": result.steps}
    return name in published and all(published[key] == value for key, value in row.items())


def by_episode(results: Iterable[Result]) -> dict[str, pd.DataFrame]:
    """Score of every episode, accuracies in 0..1, a column a learner, by `SET_NwKs_LIST`."""
    columns: dict[str, dict[str, Any]] = {}
    for result in results:
        name = f"{result.test.key}_{result.scores.episode_list[:16]}"
        columns.setdefault(name, {})[result.label] = result.scores.by_episode()
    return {name: pd.DataFrame(each) for name, each in columns.items()}


def metrics(
    results: Iterable[Result], main: FixedEpisodes | None, learner: MetaLearner
) -> dict[str, float]:
    """`test/SET_NwKs/acc`, `acc_ci95`, `floor_acc` in 0..1; of the main set as `test/acc` too.

    Of regression `test/SET_Ks/mse` and so on, and `mse_after_1` for each number of inner steps.
    """
    out: dict[str, float] = {}
    for result in results:
        mean, ci95 = result.scores.interval()
        measure = result.scores.measure
        for prefix in [f"test/{result.test.key}/"] + ["test/"] * (result.test is main):
            if result.learner != learner.label:  # MLflow draws three charts a row; the table has
                out[f"{prefix}floor_{measure}"] = mean  # its interval
                continue
            if result.steps is not None:
                out[f"{prefix}{measure}_after_{result.steps}"] = mean
            if is_own(result, learner):
                out |= {f"{prefix}{measure}": mean, f"{prefix}{measure}_ci95": ci95}
    return out


def print_frame(frame: pd.DataFrame, title: str) -> None:
    """The table on standard output: for people, sets apart from each other."""
    table = Table(title=title, title_justify="left")
    shown = frame["published"].notna().any()
    measure: Measure = "acc" if "accuracy" in frame else "mse"
    score = "accuracy" if measure == "acc" else "mse"
    for name in ("test set", "task", "learner", score, "episodes", "protocol"):
        table.add_column(name, justify="right" if name in (score, "episodes") else "left")
    if shown:
        table.add_column("published", justify="right")
    for (data, k_shot), group in frame.groupby(["data", "k_shot"], sort=False):
        for i, row in enumerate(group.to_dict("records")):
            steps = row.get("inner_steps")
            cells = [
                data if i == 0 else "",
                task_name(measure, row["n_way"], k_shot) if i == 0 else "",
                with_steps(row["learner"], None if pd.isna(steps) else steps),
                f"{row[score]:.2f} ± {row['ci95']:.2f}" + " %" * (measure == "acc"),
                str(row["episodes"]),
                row["protocol"],
            ]
            if shown:
                form = "{:.1f} %" if measure == "acc" else "{:.2f}"
                cells.append("" if math.isnan(row["published"]) else form.format(row["published"]))
            table.add_row(*cells, end_section=i == len(group) - 1)
    Console(width=None if sys.stdout.isatty() else 110).print(table)
