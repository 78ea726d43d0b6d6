"""The runs of a sweep: a parent, and its trials as children."""

import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from pipeline.annotations import better
from pipeline.errors import UserError
from pipeline.tracking import store
from pipeline.tracking.run import Run

PARENT = "mlflow.parentRunId"


@contextmanager
def _if_it_answers() -> Iterator[None]:
    """A server that went away does not stop a sweep; what was left undone is said."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, UserError) as error:
        print(f"tracking: {' '.join(str(error).split())[:200]}", file=sys.stderr)


def status(run_id: str | None) -> str | None:
    """The status of a run; None if the store has no such run."""
    from mlflow.exceptions import MlflowException

    if not run_id:
        return None
    with suppress(MlflowException):
        info = store.connect().get_run(run_id).info
        return info.status if info.lifecycle_stage == "active" else None
    return None


def close_dead(parent: Run, alive: Collection[int], others: bool) -> None:
    """Mark KILLED the child runs that say RUNNING and whose trial does not run any more.

    Args:
        alive: numbers of the trials that run.
        others: close those too that are no trials.
    """
    wanted = f"tags.`{PARENT}` = '{parent.run_id}' and attributes.status = 'RUNNING'"
    with _if_it_answers():
        client = store.connect()
        for child in client.search_runs([parent.experiment_id], wanted, max_results=1000):
            trial = child.data.tags.get("trial")
            if others if trial is None else int(trial) not in alive:
                client.set_terminated(child.info.run_id, "KILLED")


def name_best(parent: Run, values: dict[str, Any]) -> None:
    """The best values as parameters, which do not change any more, and as tags, which do."""
    named = {f"best.{key}": str(value) for key, value in values.items()}
    parent.set_tags(named)
    with _if_it_answers():
        known = store.connect().get_run(parent.run_id).data.params
        if not any(known.get(key, value) != value for key, value in named.items()):
            parent.log_values(named)


def view(parent: Run, keys: Sequence[str], measure: str) -> str | None:
    """The address of the trials in MLflow's UI, the best first, with these parameters as columns.

    Args:
        measure: what they are ranked by, acc or mse.

    Returns:
        None if the store does not take it.
    """
    best = f"metrics.`val/best_{measure}`"
    columns = [
        best,
        "tags.`optuna.state`",
        "attributes.`Duration`",
        *(f"params.`{k}`" for k in keys),
    ]
    wanted = f"tags.mlflow.parentRunId = '{parent.run_id}'"
    uri = store.tracking_uri()
    server = uri if uri.startswith("http") else "http://127.0.0.1:5000"
    with _if_it_answers():
        client, key = store.connect(), f"study-{parent.run_id[:8]}"
        up = better(measure) == "min"
        path = store.share_view(client, parent.experiment_id, key, columns, wanted, best, up)
        return f"{server}/{path}{store.CHARTS}"
    return None
