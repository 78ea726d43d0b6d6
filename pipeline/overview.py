"""The table of all learners that a survey writes: Markdown for docs/learners.md. Floor 4."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import pandas as pd
from omegaconf import DictConfig

from pipeline.compose import CONF, compose_config
from pipeline.learners.base import MetaLearner
from pipeline.learners.gradient import GradientLearner
from pipeline.plan import Job, Shelf, as_overrides

_HEADER = re.compile(r"# (?P<name>[^(]+) \((?P<paper>[^()]*\d{4}[a-z]?[^()]*)\)[.:,;]")
_KINDS = ("embedding", "gradient", "transfer", "head")


class Method(NamedTuple):
    """What the first line of a YAML of conf/learner or conf/head says: `# NAME (PAPER): ...`."""

    name: str
    paper: str


def method(path: Path) -> Method:
    """Name and paper of a learner or head.

    Raises:
        ValueError: if the first comment does not give them.
    """
    lines = [line for line in path.read_text().splitlines() if not line.startswith("# @package")]
    found = _HEADER.match(lines[0])
    if not found:
        raise ValueError(f"{path}: the first line must be '# NAME (AUTHORS YEAR): ...'")
    return Method(found["name"], found["paper"])


def write(out: Path, cfg: DictConfig, jobs: Sequence[Job], shelf: Shelf) -> None:
    """Write the table with what is there of it.

    Args:
        out: the file.
        cfg: of the survey.
        jobs: its trainings.
        shelf: where their results are.
    """
    results = {job.name: shelf.results(job) for job in jobs}
    rows = list(_rows(cfg, jobs, results))
    rows.sort(key=lambda row: (_KINDS.index(row["kind"]), row["learner"].replace("`", "")))
    floors = _cells(cfg, [(job.data, shelf.floor(job)) for job in jobs])
    for row in rows:
        row |= {k: f"*{row[k]}*" for k, floor in floors.items() if _value(row[k]) < _value(floor)}
    rows.append({"learner": "pixel floor", "method": "nearest class mean on raw pixels",
                 "kind": "", "protocol": "inductive", "parameters": "0", **floors})  # fmt: skip
    frame = pd.DataFrame(rows).fillna("")
    out.write_text(f"{_introduction(cfg, frame)}\n\n{_markdown(frame)}\n")


def _rows(
    cfg: DictConfig, jobs: Sequence[Job], results: dict[str, pd.DataFrame]
) -> Iterator[dict[str, Any]]:
    shown = [job for job in jobs if not job.name.endswith(" half")]
    for learner in dict.fromkeys(job.learner for job in shown):
        mine = [job for job in shown if job.learner == learner]
        tables = [(job.data, results[job.name]) for job in mine if len(results[job.name])]
        labels = dict.fromkeys(label for _, table in tables for label in table["learner"])
        for label in labels:
            own = [(data, table[table["learner"] == label]) for data, table in tables]
            head = label.partition(" + ")[2]
            name = mine[0].heads.get(head, "") if head else learner
            if name:
                yield _row(cfg, learner, name, bool(head), own)


def _row(
    cfg: DictConfig, learner: str, name: str, is_head: bool, own: list[tuple[str, pd.DataFrame]]
) -> dict[str, Any]:
    about = method(CONF / ("head" if is_head else "learner") / f"{name}.yaml")
    first = next(table.iloc[0] for _, table in own if len(table))
    kind = "head" if is_head else _kind(learner)
    return {
        "learner": f"`{learner}` `head={name}`" if is_head else f"`{learner}`",
        "method": f"{about.name} ({about.paper})",
        "kind": kind,
        "protocol": first["protocol"],
        "parameters": f"{int(first['parameters']):,}",
        **_cells(cfg, own),
    }


def _kind(learner: str) -> str:
    node = compose_config("train", [f"learner={learner}"]).learner
    target: type[MetaLearner] = hydra.utils.get_class(node._target_)
    if issubclass(target, GradientLearner):
        return "gradient"
    return "transfer" if target.trains_on == "images" else "embedding"


def _cells(cfg: DictConfig, tables: Sequence[tuple[str, pd.DataFrame]]) -> dict[str, str]:
    """The accuracies by column, the latest where a test was repeated."""
    cells = {f"{data} {n}w{k}s": "" for data in cfg.data for n, k in cfg.tests}
    for data, table in tables:
        for row in table.itertuples():
            column = f"{data} {row.n_way}w{row.k_shot}s"
            if column in cells:
                cells[column] = f"{row.accuracy:.1f} ± {row.ci95:.1f}"
    return cells


def _value(cell: str) -> float:
    """The accuracy in a cell; nan, which is below nothing, in an empty one."""
    return float(cell.partition(" ")[0] or "nan")


def _introduction(cfg: DictConfig, frame: pd.DataFrame) -> str:
    """What was done, as far as it shows in the table."""
    which = "the learners below" if cfg.learners else "all learners of `conf/learner`"
    kept = {k: {n: v for n, v in given.items() if n != "root"} for k, given in cfg.data.items()}
    sets = ", ".join(
        f"`{' '.join([f'data={k}', *as_overrides({'data': v})])}`" for k, v in kept.items()
    )
    changes = f"`{' '.join(as_overrides(cfg.overrides))}`"
    budgets = " and ".join(f"{n:,} of {data}" for data, n in cfg.images.items())
    episodes = " and ".join(f"{n:,} of {data}" for data, n in cfg.episodes.items())
    text = f"""# Learners

Written by `python -m pipeline.survey`, which trains {which} and tests them;
`conf/survey.yaml` says with what. Accuracy in percent with its 95 % interval over test episodes,
{episodes}, the same ones for all, of classes that no training has seen;
5w1s is 5-way 1-shot.

- **The budget** is a number of images shown in training (support and queries of tasks, or plain
  batches), {budgets}, each learner with the other settings of its YAML,
  and with {changes}. These are minutes on a CPU core and not the papers' days:
  the table compares what learners make of little, and `conf/experiment` has the papers' recipes.
- *In italics*: below the pixel floor, for want of training: embeddings of so few steps are worse
  than pixels, and a task of 20 classes uses up the budget in fewer steps still.
- **Parameters** are those of the first training, with its classifier or head.
- **Transductive**: a prediction depends on the other queries, through norm layers that use the
  statistics of the batch at hand or through the head. Compare such rows with each other.
- Data: {sets}."""
    if "head" in set(frame["kind"]):
        text += f"""
- `head=NAME` is tried on the network of `{cfg.heads_on}`, as `python -m pipeline.evaluate run=ID
  head=NAME` does for any embedding learner."""
    if more := list(dict.fromkeys(str(n_way) for n_way, _ in cfg.tests))[1:]:
        again = "- and ".join(more)
        text += f"\n- Learners built for one number of classes were trained again for {again}-way."
    halves = [f"`{k}` spends half of it as `{v}`" for k, v in cfg.half.items()
              if f"`{k}`" in set(frame["learner"])]  # fmt: skip
    if halves:
        text += f"\n- {' and '.join(halves)}, whose network it takes over."
    return text


def _markdown(frame: pd.DataFrame) -> str:
    lines = [list(frame), [":-" if i < 4 else "-:" for i in range(frame.shape[1])]]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in [*lines, *frame.to_numpy()])
