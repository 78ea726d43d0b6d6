"""Runs as tables: what a report reads of the store."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from pipeline.errors import UserError
from pipeline.tracking import store


class Study(NamedTuple):
    """What a sweep left with its parent run.

    Attributes:
        trials: number, state, value, and a column params_KEY for every parameter searched.
        importance: of the parameters, by key; empty if it was not computed.
    """

    trials: pd.DataFrame
    importance: dict[str, float]


class Reader:
    """Reads the store that new runs are written to.

    Raises:
        UserError: in all its methods, if the store cannot be read.
    """

    def __init__(self) -> None:
        self._client, self.uri = store.connect(), store.tracking_uri()

    def experiment(self, name: str, new: bool = False) -> pd.DataFrame:
        """All runs of an experiment; see `_search`.

        Args:
            new: whether there may be none of that name yet; it has no runs then.

        Raises:
            UserError: naming the experiments that there are, if there is none of that name.
        """
        with store.opening(self.uri):
            there = {e.name: e.experiment_id for e in self._client.search_experiments()}
            if name not in there:
                if new:
                    return _frame([])
                raise UserError(
                    f"experiment: no experiment {name!r} in {self.uri}; "
                    f"there are {', '.join(sorted(there))}"
                )
            return self._search([there[name]])

    def runs(self, run_ids: Sequence[str]) -> pd.DataFrame:
        """The runs of these ids; see `_search`.

        Raises:
            UserError: naming the newest runs, if there is none of an id.
        """
        with store.opening(self.uri):
            known = [store.existing(self._client, run_id) for run_id in run_ids]
            return _frame([self._client.get_run(run_id) for run_id in dict.fromkeys(known)])

    def study(self, name: str) -> tuple[Study, pd.DataFrame]:
        """A sweep, and its runs but for the trials: those that may have been tested.

        Raises:
            UserError: naming the studies that there are, if there is none of that name or it has
                no table of trials yet.
        """
        with store.opening(self.uri):
            everywhere = [e.experiment_id for e in self._client.search_experiments()]
            tagged = self._search(everywhere, "tags.study LIKE '%'")
        if tagged.empty or name not in set(tagged["tags.study"]):
            there = [] if tagged.empty else sorted(set(tagged["tags.study"]))
            raise UserError(
                f"study: no study {name!r} in {self.uri}; there are {', '.join(there) or 'none'}"
            )
        runs = without_trials(tagged[tagged["tags.study"] == name])
        for run_id in runs["run_id"]:
            if trials := self._file(run_id, "study/trials.csv"):
                importance = self._file(run_id, "study/importance.json")
                read = json.loads(importance.read_text()) if importance else {}
                return Study(pd.read_csv(trials), read), runs
        raise UserError(f"study: {name!r} has no study/trials.csv yet; it is written as it ends")

    def _search(self, experiments: list[str], condition: str = "") -> pd.DataFrame:
        """Runs, newest first: run_id, name, start and a column for each params.KEY and tags.KEY.

        And metrics.KEY, the latest of each.
        """
        found: list[Any] = []
        token = None
        while True:
            page = self._client.search_runs(experiments, condition, page_token=token)
            found += page
            if not (token := page.token):
                return _frame(found)

    def results(self, run_id: str) -> pd.DataFrame:
        """All rows of a run's results.json, in the order in which they were written."""
        path = self._file(run_id, "results.json")
        if path is None:
            return pd.DataFrame()
        table = json.loads(path.read_text())
        return pd.DataFrame(table["data"], columns=table["columns"])

    def accuracies(self, run_id: str, episode_list: str) -> pd.DataFrame | None:
        """Accuracy of every episode of a list in 0..1, a column a learner; None if not kept."""
        with store.opening(self.uri):
            kept = [  # a file of the learner's own test, and one a head
                pd.read_csv(self._client.download_artifacts(run_id, entry.path))
                for entry in self._client.list_artifacts(run_id, "episodes")
                if entry.path.endswith(f"_{episode_list}.csv")
            ]
        joined = pd.concat(kept, axis=1) if kept else None
        return None if joined is None else joined.loc[:, ~joined.columns.duplicated()]

    def curve(self, run_id: str, metric: str) -> pd.Series:
        """The values of a metric by step, the latest of each."""
        with store.opening(self.uri):
            points = self._client.get_metric_history(run_id, metric)
        points.sort(key=lambda point: point.timestamp)
        latest: dict[int, float] = {point.step: point.value for point in points}
        return pd.Series(latest, dtype=float).sort_index()

    def _file(self, run_id: str, path: str) -> Path | None:
        """The artifact, on this disk; None if the run has none of that path."""
        folder = path.rpartition("/")[0]
        with store.opening(self.uri):
            if not any(a.path == path for a in self._client.list_artifacts(run_id, folder)):
                return None
            return Path(self._client.download_artifacts(run_id, path))


def without_trials(runs: pd.DataFrame) -> pd.DataFrame:
    """Without the trials of sweeps, which are selected by validation and never tested."""
    return runs[runs["tags.trial"].isna()] if "tags.trial" in runs else runs


def _frame(runs: Sequence[Any]) -> pd.DataFrame:
    """A row a run of MLflow's entities."""
    rows = [
        {"run_id": run.info.run_id, "name": run.info.run_name, "start": run.info.start_time}
        | {f"params.{k}": v for k, v in run.data.params.items()}
        | {f"metrics.{k}": v for k, v in run.data.metrics.items()}
        | {f"tags.{k}": v for k, v in run.data.tags.items()}
        for run in runs
    ]
    return pd.DataFrame(rows, columns=None if rows else ["run_id", "name", "start"])
