"""The tests of runs: gathered, named, and kept to the same episodes. Floor 4."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from pipeline.errors import UserError

FLOOR = "PixelCentroid"
_NO_CONFIGURATION = {
    "seed", "data.seed", "run_name", "experiment_name", "resume", "test", "test_k_shot",
    "also_test", "published", "data.test_episodes", "data.root", "data.num_workers",
    "trainer.accelerator",
}  # fmt: skip
"""Parameters in which runs of one configuration may differ; the data's fingerprint counts."""
_NOT_KEPT = {"backbone": "", "parameters": None, "adapt_ms": None, "episode_list": ""}
"""What older results lack, and what stands in its place."""


def collect(runs: pd.DataFrame, results: Callable[[str], pd.DataFrame]) -> pd.DataFrame:
    """A row for each learner, test set, shape and episode list of a run, with facts of the run.

    Of tests repeated on the same list, and of those that name none, the latest counts.

    Args:
        runs: as `tracking.read` gives them.
        results: the rows of results.json of a run id.

    Returns:
        Columns of results.json and run_id, start, seed, data_seed, trained_on, device,
        train_seconds, configuration (what was trained, as a dict) and label, its name.
    """
    parts = [_of_run(run, results(run["run_id"])) for run in runs.to_dict("records")]
    parts = [part for part in parts if len(part)]
    if not parts:
        return pd.DataFrame()
    tests = pd.concat(parts, ignore_index=True)
    return tests.assign(label=_labels(tests))


def _of_run(run: Mapping[str, Any], table: pd.DataFrame) -> pd.DataFrame:
    if table.empty:
        return table
    table = table.assign(**{k: v for k, v in _NOT_KEPT.items() if k not in table})
    for column in ("backbone", "episode_list"):  # older rows of a run that was evaluated again
        table[column] = table[column].fillna("")
    key = ["learner", "data", "n_way", "k_shot", "n_query", "episode_list"]
    table = table.drop_duplicates(key, keep="last")
    parameters = {
        key.removeprefix("params."): value
        for key, value in run.items()
        if key.startswith("params.") and isinstance(value, str)  # nan: only other runs have it
    }
    configuration = {  # an older run lacks a later key, which is null
        k: v for k, v in parameters.items() if k not in _NO_CONFIGURATION and v != "None"
    }
    configuration["images"] = str(run.get("tags.data.fingerprint"))[:8]
    table = table.assign(
        run_id=run["run_id"],
        start=run["start"],
        seed=parameters.get("seed", ""),
        data_seed=parameters.get("data.seed", ""),
        trained_on=run.get("tags.data"),
        device=run.get("tags.device"),
        train_seconds=run.get("metrics.train/seconds", float("nan")),
    )
    table["configuration"] = [configuration] * len(table)
    table.loc[table["learner"] == FLOOR, ["trained_on", "train_seconds"]] = None
    return table


def only(tests: pd.DataFrame, wanted: Mapping[str, Any]) -> pd.DataFrame:
    """The tests with these values, by column."""
    for column, value in wanted.items() if len(tests) else ():
        tests = tests[tests[column] == value]
    return tests


def with_published(tests: pd.DataFrame, stated: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """With a value of the literature where the run itself states none.

    Args:
        stated: learner, data, n_way, k_shot and `backbone._target_` that it is of, accuracy in
            percent and its source.
    """
    tests = tests.copy()
    for each in stated if len(tests) else ():
        same = (tests[["learner", "data", "n_way", "k_shot"]] == [
            each["learner"], each["data"], each["n_way"], each["k_shot"]
        ]).all(axis=1)  # fmt: skip
        networks = tests["configuration"].map(lambda c: c.get("backbone._target_"))
        fits = same & (networks == each["backbone._target_"]) & tests["published"].isna()
        tests.loc[fits, "published"] = each["accuracy"]
        tests.loc[fits, "published_source"] = each["source"]
    return tests


def _labels(tests: pd.DataFrame) -> pd.Series:
    """A name for each configuration: learner, backbone if there are several, what else differs."""
    frozen = tests["configuration"].map(lambda c: tuple(sorted(c.items())))
    trained = tests["learner"] != FLOOR
    several = tests.loc[trained, "backbone"].nunique() > 1
    labels = tests["learner"].copy()
    for (learner, backbone), group in tests[trained].groupby(["learner", "backbone"]):
        name = f"{learner} {backbone}".strip() if several else learner
        differences = dict(_told_apart(list(dict.fromkeys(frozen[group.index]))))
        labels[group.index] = [name + differences[c] for c in frozen[group.index]]
    return labels


def _told_apart(
    configurations: Sequence[tuple[tuple[str, str], ...]],
) -> Iterator[tuple[tuple[tuple[str, str], ...], str]]:
    """Each with the keys and values in which it differs from the others."""
    table = pd.DataFrame([dict(each) for each in configurations]).fillna("-")
    varying = [k for k in sorted(table, key=lambda k: (len(k), k)) if table[k].nunique() > 1]
    distinct = table[varying].T.drop_duplicates().index  # train_n_way follows n_way
    for configuration, row in zip(configurations, table.to_dict("records"), strict=True):
        parts = ", ".join(f"{_short(key)}={row[key]}" for key in distinct)
        yield configuration, f" ({parts})" if parts else ""


def _short(key: str) -> str:
    group, _, rest = key.partition(".")
    return rest if rest and group in ("learner", "backbone", "trainer") else key


def on_one_list(tests: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The tests on the longest list that all runs share, and those of runs without any list.

    Returns:
        The rows, and notes on what was left out.

    Raises:
        UserError: if there is no such list; says which runs were tested on what.
    """
    listed = tests[tests["episode_list"] != ""]
    old = tests[~tests["run_id"].isin(listed["run_id"])]
    old = old.drop_duplicates(["run_id", "learner"], keep="last")
    if listed.empty:
        return old, []
    runs = listed.groupby("episode_list")["run_id"].agg(set)
    shared = [each for each, ids in runs.items() if ids == set(listed["run_id"])]
    if not shared:
        raise UserError(_conflict(listed))
    sizes = listed.drop_duplicates("episode_list").set_index("episode_list")["episodes"]
    longest = max(shared, key=lambda each: sizes[each])
    others = [f"{n:,}" for n in sorted(set(sizes.drop(longest)))]
    notes = [f"Tests on other lists, of {', '.join(others)} episodes, are left out."]
    rows = pd.concat([listed[listed["episode_list"] == longest], old])
    return rows, notes if others else []


def _conflict(listed: pd.DataFrame) -> str:
    """Which runs were tested on which list, and how to go on."""
    groups = [group for _, group in listed.groupby("episode_list")]
    groups.sort(key=lambda group: (group["run_id"].nunique(), group["episodes"].iat[0]))
    told = []
    for group in groups:
        first = group.iloc[0]
        names = [f"{r.run_id} ({r.label})" for r in group.drop_duplicates("run_id").itertuples()]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        told.append(
            f"{first['episodes']} episodes of {first['n_query']} queries a class (list "
            f"{first['episode_list'][:8]}) {', '.join(names[:3])}{more}"
        )
    least, most = groups[0].iloc[0], groups[-1].iloc[0]
    differ = [key for key in ("episodes", "n_query") if least[key] != most[key]]
    if differ:
        changes = " ".join(f"{key}={most[key]}" for key in ["k_shot", *differ])
        told.append(f"test alike with python -m pipeline.evaluate run={least['run_id']} {changes}")
    else:
        told.append("the images or data.eval_seed are not the same")
    by_length = "episodes=N or " if "episodes" in differ else ""
    told.append(f"or select with {by_length}runs=[ID,...]")
    return f"tested on different episodes, which cannot be ranked: {'; '.join(told)}"
