"""Tested runs to rankings: seeds together, unlike tests apart, differences paired. Floor 4."""

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from pipeline.errors import UserError
from pipeline.paired import compare, holm, mean_t95

FLOOR = "PixelCentroid"
SIGNIFICANT = 0.05
_TEST = ["data", "n_way", "k_shot", "protocol"]
"""One ranking each."""
_NO_CONFIGURATION = {
    "seed", "data.seed", "run_name", "experiment_name", "resume", "test", "test_k_shot",
    "also_test", "published", "data.test_episodes", "data.root", "data.num_workers",
    "trainer.accelerator",
}  # fmt: skip
"""Parameters in which runs of one configuration may differ; the data's fingerprint counts."""

Accuracies = Callable[[str, str], pd.DataFrame | None]
"""From the id of a run and of a list: accuracy of every episode in 0..1, a column a learner."""


class Ranking(NamedTuple):
    """What may be compared: learners on one test set, task shape, protocol and episode list.

    Attributes:
        rows: best first, the pixel floor last; columns as `_row` makes them, and `mark`: best,
            tied (not distinguishable from the best), behind, not paired or floor; `to_best`,
            `to_best_low`, `to_best_high` in percentage points and `p_holm` of the paired ones.
        pairs: a, b, difference with low and high in percentage points, p, p_holm, episodes.
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


def collect(runs: pd.DataFrame, results: Callable[[str], pd.DataFrame]) -> pd.DataFrame:
    """The tests of runs: a row for each learner, test set, shape and episode list of a run.

    Of tests repeated on the same list, and of those without one, the latest counts.

    Args:
        runs: as `tracking.read` gives them.
        results: the rows of results.json of a run id.
    """
    parts = [_of_run(run, results(run["run_id"])) for run in runs.to_dict("records")]
    parts = [part for part in parts if len(part)]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def _of_run(run: dict[str, Any], table: pd.DataFrame) -> pd.DataFrame:
    columns = ["published", "published_source", "backbone", "parameters", "adapt_ms"]
    for column in (*columns, "episode_list"):
        if column not in table:
            table[column] = None  # of a run made before it was kept
    table["episode_list"] = table["episode_list"].fillna("")
    key = ["learner", "data", "n_way", "k_shot", "n_query", "episode_list"]
    table = table.drop_duplicates(key, keep="last") if len(table) else table
    known = {k.removeprefix("params."): v for k, v in run.items()
             if k.startswith("params.") and isinstance(v, str)}  # fmt: skip
    configuration = {k: v for k, v in known.items() if k not in _NO_CONFIGURATION}
    configuration["images"] = str(run.get("tags.data.fingerprint"))[:8]
    facts = {
        "run_id": run["run_id"],
        "start": run["start"],
        "seed": known.get("seed", ""),
        "data_seed": known.get("data.seed", ""),
        "trained_on": run.get("tags.data"),
        "device": run.get("tags.device"),
        "train_seconds": run.get("metrics.train/seconds"),
    }
    table = table.assign(**facts)
    table["configuration"] = [configuration] * len(table)
    return table


def rank(tests: pd.DataFrame, accuracies: Accuracies) -> list[Ranking]:
    """Rankings of tests from `collect`, in the order of test sets, shapes and protocols.

    Raises:
        UserError: naming the runs, where no list of episodes is common to what is to be ranked.
    """
    tests = tests.assign(label=_labels(tests))
    floor = tests["learner"] == FLOOR
    alone = ~tests.set_index(_TEST[:3]).index.isin(tests[~floor].set_index(_TEST[:3]).index)
    rankings, problems = [], []
    for keys, group in tests[~floor | alone].groupby(_TEST):
        try:
            chosen, notes = _on_one_list(group)
        except UserError as error:
            problems.append(f"{keys[0]} {keys[1]}-way {keys[2]}-shot, {keys[3]}: {error}")
            continue
        same = (tests[_TEST[:3]] == list(keys[:3])).all(axis=1) & floor
        lists = set(chosen["episode_list"]), set(chosen["episodes"])
        below = tests[same & tests["episode_list"].isin(lists[0]) & tests["episodes"].isin(lists[1])]
        rankings.append(_ranking(keys, chosen, below, accuracies, notes))
    if problems:
        raise UserError("\n".join(problems))
    return rankings


def _on_one_list(group: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The rows of the longest list that all runs were tested on, and of runs without any list.

    Raises:
        UserError: if there is no such list; says which runs were tested on what.
    """
    listed = group[group["episode_list"] != ""]
    old = group[~group["run_id"].isin(listed["run_id"])]
    old = old.drop_duplicates(["run_id", "learner"], keep="last")
    if listed.empty:
        return old, []
    runs = listed.groupby("episode_list")["run_id"].agg(set)
    of_all = [each for each, ids in runs.items() if ids == set(listed["run_id"])]
    if not of_all:
        raise UserError(_conflict(listed))
    sizes = listed.drop_duplicates("episode_list").set_index("episode_list")["episodes"]
    longest = max(of_all, key=lambda each: sizes[each])
    left = sorted(int(n) for n in sizes.drop(longest))
    notes = [f"Tests on other lists of {_listing(left)} episodes are left out."] if left else []
    return pd.concat([listed[listed["episode_list"] == longest], old]), notes


def _conflict(listed: pd.DataFrame) -> str:
    """Which runs were tested on which list, and how to go on."""
    groups = sorted((part for _, part in listed.groupby("episode_list")),
                    key=lambda part: (part["run_id"].nunique(), part["episodes"].iat[0]))  # fmt: skip
    told = []
    for part in groups:
        first = part.iloc[0]
        names = [f"{r.run_id} ({r.label})" for r in part.drop_duplicates("run_id").itertuples()]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        told.append(
            f"{first['episodes']} episodes of {first['n_query']} queries a class (list "
            f"{first['episode_list'][:8]}): {', '.join(names[:3])}{more}"
        )
    least, most = groups[0].iloc[0], groups[-1].iloc[0]
    again = f"python -m pipeline.evaluate run={least['run_id']}"
    differ = [key for key in ("episodes", "n_query") if least[key] != most[key]]
    changes = " ".join(f"{key}={most[key]}" for key in differ)
    ways = [f"test them alike ({again} {changes})"] if differ else []
    ways += ["select with episodes=N"] if listed["episodes"].nunique() > 1 else []
    why = "" if differ else "the images or data.eval_seed differ; "
    return (
        f"tested on different episodes, which cannot be ranked: {'; '.join(told)}. "
        f"{why}{', or '.join([*ways, 'select with runs=[ID,...]'])}"
    )


def _ranking(
    keys: Sequence[Any],
    chosen: pd.DataFrame,
    floor: pd.DataFrame,
    accuracies: Accuracies,
    notes: list[str],
) -> Ranking:
    rows, per_episode = [], []
    for label, group in chosen.groupby("label", sort=False):
        row, values = _row(str(label), group, accuracies, notes)
        rows.append(row)
        per_episode.append(values)
    protocol = keys[3]
    as_reference = None
    if len(floor) and FLOOR not in set(chosen["learner"]):
        latest = floor.sort_values("start").tail(1)
        row, values = _row(FLOOR, latest, accuracies, [])
        if protocol == row["protocol"]:
            rows.append(row)
            per_episode.append(values)
        else:
            as_reference = row | {"mark": "floor"}
    frame = pd.DataFrame(rows).assign(place=range(len(rows)))
    frame = frame.sort_values("accuracy", ascending=False, kind="stable", ignore_index=True)
    ordered = [per_episode[i] for i in frame.pop("place")]
    pairs = _pairs(list(frame["label"]), ordered)
    frame = _marked(frame, ordered, pairs)
    if as_reference:
        frame = pd.concat([frame, pd.DataFrame([as_reference])], ignore_index=True)
        notes.append(f"{FLOOR} is inductive; it stands here for reference and is not compared.")
    return Ranking(keys[0], int(keys[1]), int(keys[2]), protocol, frame, pairs, notes)


def _row(
    label: str, group: pd.DataFrame, accuracies: Accuracies, notes: list[str]
) -> tuple[dict[str, Any], np.ndarray | None]:
    """One configuration: its seeds together, the latest run of each.

    Returns:
        The row, accuracies in percent; and the accuracy of each episode in 0..1, averaged over
        seeds, or None if a run has not kept it.
    """
    latest = group.sort_values("start").drop_duplicates(["seed", "data_seed"], keep="last")
    if (repeats := len(group) - len(latest)) and latest["learner"].iat[0] != FLOOR:
        notes.append(f"{label}: {repeats} earlier runs of the same seed are left out.")
    first = latest.iloc[-1]
    seeds, episodes = len(latest), int(first["episodes"])
    accuracy, ci95 = float(first["accuracy"]), float(first["ci95"])
    over = f"{episodes:,} episodes"
    if seeds > 1:
        accuracy, ci95 = mean_t95(latest["accuracy"].to_numpy(float))
        over = f"{seeds} seeds of {over}"
    kept = [
        frame[run.learner].to_numpy()
        for run in latest.itertuples()
        if run.episode_list
        and (frame := accuracies(run.run_id, run.episode_list)) is not None
        and run.learner in frame
    ]
    same = ["learner", "backbone", "trained_on", "data", "n_way", "k_shot", "n_query", "protocol",
            "parameters", "published", "published_source", "episode_list"]  # fmt: skip
    row = {"label": label} | {key: first[key] for key in same}
    row |= {
        "accuracy": accuracy,
        "ci95": ci95,
        "interval_over": over,
        "episodes": episodes,
        "seeds": seeds,
        "train_seconds": pd.to_numeric(latest["train_seconds"]).mean(),
        "adapt_ms": pd.to_numeric(latest["adapt_ms"]).mean(),
        "device": ", ".join(dict.fromkeys(latest["device"].dropna())),
        "runs": " ".join(latest["run_id"]),
    }
    return row, np.mean(kept, axis=0) if len(kept) == seeds else None


def _pairs(labels: Sequence[str], per_episode: Sequence[np.ndarray | None]) -> pd.DataFrame:
    """Every two of the rows that can be paired, the better one first."""
    rows = []
    kept = [(label, x) for label, x in zip(labels, per_episode, strict=True) if x is not None]
    for (a, x), (b, y) in combinations(kept, 2):
        mean, low, high, p = compare(x, y)
        difference = {"difference": 100 * mean, "low": 100 * low, "high": 100 * high}
        rows.append({"a": a, "b": b} | difference | {"p": p, "episodes": len(x)})
    columns = ["a", "b", "difference", "low", "high", "p", "p_holm", "episodes"]
    frame = pd.DataFrame(rows, columns=columns)
    frame["p_holm"] = holm(frame["p"].to_numpy(float))
    return frame


def _marked(
    frame: pd.DataFrame, per_episode: Sequence[np.ndarray | None], pairs: pd.DataFrame
) -> pd.DataFrame:
    """The rows with how they stand to the best one."""
    best = frame["label"].iat[0]
    to_best = pairs[pairs["a"] == best].set_index("b")
    marks: list[dict[str, Any]] = []
    for label, values in zip(frame["label"], per_episode, strict=True):
        if label in to_best.index:
            pair = to_best.loc[label]
            tied = pair["p_holm"] >= SIGNIFICANT
            marks.append({
                "mark": "tied" if tied else "behind", "to_best": -pair["difference"],
                "to_best_low": -pair["high"], "to_best_high": -pair["low"],
                "p_holm": pair["p_holm"],
            })  # fmt: skip
        else:
            marks.append({"mark": "best" if label == best else "not paired"})
        if values is None and label == best and len(frame) > 1:
            marks[-1]["mark"] = "best, not paired"
    columns = ["mark", "to_best", "to_best_low", "to_best_high", "p_holm"]
    return frame.join(pd.DataFrame(marks, columns=columns))


def _labels(tests: pd.DataFrame) -> pd.Series:
    """A name for each configuration: learner, backbone if there are several, what differs."""
    configurations = tests["configuration"].map(lambda c: tuple(sorted(c.items())))
    trained = tests["learner"] != FLOOR
    networks = tests.loc[trained, "backbone"].nunique(dropna=False) > 1
    labels = tests["learner"].copy()
    for _, index in tests[trained].groupby(["learner", "backbone"], dropna=False).groups.items():
        names = dict(_told_apart(list(dict.fromkeys(configurations[index]))))
        network = tests.loc[index, "backbone"].fillna("") if networks else ""
        labels[index] = (labels[index] + " " + network).str.strip()
        labels[index] += configurations[index].map(names)
    return labels


def _told_apart(configurations: Sequence[tuple[tuple[str, str], ...]]) -> Iterator[tuple[Any, str]]:
    """Each with the keys and values in which it differs from the others."""
    table = pd.DataFrame([dict(c) for c in configurations]).fillna("-")
    varying = [k for k in sorted(table, key=lambda k: (len(k), k)) if table[k].nunique() > 1]
    distinct = table[varying].T.drop_duplicates().index  # train_n_way follows n_way
    for configuration, row in zip(configurations, table.to_dict("records"), strict=True):
        parts = [f"{_short(key)}={row[key]}" for key in distinct]
        yield configuration, f" ({', '.join(parts)})" if parts else ""


def _short(key: str) -> str:
    group, _, rest = key.partition(".")
    return rest if rest and group in ("learner", "backbone", "trainer") else key


def _listing(numbers: Sequence[int]) -> str:
    return ", ".join(f"{n:,}" for n in dict.fromkeys(numbers))
