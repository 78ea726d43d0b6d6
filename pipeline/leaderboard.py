"""Rankings of what was tested alike: seeds together, protocols apart, pairs compared. Floor 4."""

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from pipeline.errors import UserError
from pipeline.paired import compare, holm, mean_t95
from pipeline.tested import FLOOR, on_one_list

SIGNIFICANT = 0.05
_SET = ["data", "n_way", "k_shot"]
_STANDING = ["mark", "to_best", "to_best_low", "to_best_high", "p_holm"]
_PAIR = ["a", "b", "difference", "low", "high", "p", "p_holm", "episodes"]

Accuracies = Callable[[str, str], pd.DataFrame | None]
"""From the ids of a run and of a list: accuracy of every episode in 0..1, a column a learner."""


class Ranking(NamedTuple):
    """What may be compared: learners on one test set, task shape, protocol and episode list.

    Attributes:
        rows: best first; label, learner, backbone, accuracy and ci95 in percent, interval_over and
            the other facts of `_row`; mark (best, tied if not distinguishable from it, behind, not
            paired, floor); to_best, to_best_low, to_best_high in percentage points and p_holm of
            those that are paired.
        pairs: a, b, difference, low and high in percentage points, p, p_holm, episodes.
        notes: what a reader must know.
    """

    data: str
    n_way: int
    k_shot: int
    protocol: str
    rows: pd.DataFrame
    pairs: pd.DataFrame
    notes: list[str]

    @property
    def title(self) -> str:
        """Test set, task shape and protocol."""
        return f"{self.data}: {self.n_way}-way {self.k_shot}-shot, {self.protocol}"


def rank(tests: pd.DataFrame, accuracies: Accuracies) -> list[Ranking]:
    """Rankings of tests from `tested.collect`, in the order of sets, shapes and protocols.

    The pixel floor, which every run leaves, is a row of the inductive ranking, and stands under the
    transductive one for reference.

    Raises:
        UserError: naming the runs, where no list of episodes is common to what is to be ranked.
    """
    if tests.empty:
        return []
    floor = tests["learner"] == FLOOR
    sets = tests.set_index(_SET).index
    alone = ~sets.isin(tests[~floor].set_index(_SET).index)  # only the floor was tested there
    rankings, problems = [], []
    for keys, group in tests[~floor | alone].groupby([*_SET, "protocol"]):
        data, n_way, k_shot, protocol = keys
        try:
            chosen, notes = on_one_list(group)
        except UserError as error:
            problems.append(f"{data} {n_way}-way {k_shot}-shot, {protocol}: {error}")
            continue
        below = tests[floor & ~alone & (sets == keys[:3])]
        for column in ("episode_list", "episodes"):
            below = below[below[column].isin(chosen[column])]
        rows, per_episode = _rows(chosen, below, protocol, accuracies, notes)
        pairs = _pairs(list(rows["label"]), per_episode)
        rows = rows.join(_standing(list(rows["label"]), per_episode, pairs))
        if len(below) and FLOOR not in set(rows["label"]):
            reference, _ = _row(FLOOR, below.sort_values("start").tail(1), accuracies, [])
            rows.loc[len(rows)] = reference | {"mark": "floor"}
            notes.append(f"{FLOOR} is inductive: it stands here for reference, without a rank.")
        rankings.append(Ranking(data, n_way, k_shot, protocol, rows, pairs, notes))
    if problems:
        raise UserError("\n".join(problems))
    return rankings


def _rows(
    chosen: pd.DataFrame,
    floor: pd.DataFrame,
    protocol: str,
    accuracies: Accuracies,
    notes: list[str],
) -> tuple[pd.DataFrame, list[np.ndarray | None]]:
    """A row a configuration, best first, with its accuracies by episode; adds to the notes."""
    groups = [(str(label), group) for label, group in chosen.groupby("label")]
    fitting = floor[floor["protocol"] == protocol].sort_values("start")
    if len(fitting):
        groups.append((FLOOR, fitting.tail(1)))
    both = [_row(label, group, accuracies, notes) for label, group in groups]
    both.sort(key=lambda pair: -pair[0]["accuracy"])
    return pd.DataFrame([row for row, _ in both]), [values for _, values in both]


def _row(
    label: str, group: pd.DataFrame, accuracies: Accuracies, notes: list[str]
) -> tuple[dict[str, Any], np.ndarray | None]:
    """One configuration: its seeds together, the latest run of each.

    Returns:
        The row; and the accuracy of each episode in 0..1, averaged over seeds, or None if it was
        not kept for all of them.
    """
    latest = group.sort_values("start").drop_duplicates(["seed", "data_seed"], keep="last")
    if repeats := len(group) - len(latest):
        notes.append(f"{label}: of runs with the same seed the latest counts ({repeats} left out).")
    first, seeds = latest.iloc[-1], len(latest)
    accuracy, ci95 = float(first["accuracy"]), float(first["ci95"])
    over = f"{first['episodes']:,} episodes"
    if seeds > 1:
        accuracy, ci95 = mean_t95(latest["accuracy"].to_numpy(float))
        over = f"{seeds} seeds of {over}"
    kept = []
    for run in latest.itertuples():
        frame = accuracies(run.run_id, run.episode_list) if run.episode_list else None
        if frame is not None and run.learner in frame:
            kept.append(frame[run.learner].to_numpy())
    facts = ["learner", "backbone", "trained_on", *_SET, "n_query", "protocol", "episodes",
             "parameters", "published", "published_source", "episode_list"]  # fmt: skip
    row = {"label": label, **first[facts].to_dict()} | {
        "accuracy": accuracy,
        "ci95": ci95,
        "interval_over": over,
        "seeds": seeds,
        "train_seconds": pd.to_numeric(latest["train_seconds"]).mean(),
        "adapt_ms": pd.to_numeric(latest["adapt_ms"]).mean(),
        "device": ", ".join(dict.fromkeys(latest["device"].dropna())),
        "runs": " ".join(latest["run_id"]),
    }
    return row, np.mean(kept, axis=0) if len(kept) == seeds else None


def _pairs(labels: Sequence[str], per_episode: Sequence[np.ndarray | None]) -> pd.DataFrame:
    """Every two of the rows that can be paired, the better one first."""
    kept = [(label, x) for label, x in zip(labels, per_episode, strict=True) if x is not None]
    rows = []
    for (a, x), (b, y) in combinations(kept, 2):
        found = compare(100 * x, 100 * y)
        rows.append([a, b, found.mean, found.low, found.high, found.p, found.p, len(x)])
    pairs = pd.DataFrame(rows, columns=_PAIR)
    pairs["p_holm"] = holm(pairs["p"].to_numpy(float))
    return pairs


def _standing(
    labels: Sequence[str], per_episode: Sequence[np.ndarray | None], pairs: pd.DataFrame
) -> pd.DataFrame:
    """How each row stands to the first, the best one."""
    best = labels[0]
    to_best = pairs[pairs["a"] == best].set_index("b")
    rows: list[dict[str, Any]] = []
    for label, values in zip(labels, per_episode, strict=True):
        alone = values is None and len(labels) > 1
        if label == best:
            rows.append({"mark": "best, not paired" if alone else "best"})
        elif label in to_best.index:
            pair = to_best.loc[label]
            mark = "tied" if pair["p_holm"] >= SIGNIFICANT else "behind"
            interval = [-pair["difference"], -pair["high"], -pair["low"], pair["p_holm"]]
            rows.append(dict(zip(_STANDING, [mark, *interval], strict=True)))
        else:
            rows.append({"mark": "not paired"})
    return pd.DataFrame(rows, columns=_STANDING)
