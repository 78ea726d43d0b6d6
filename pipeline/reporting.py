"""What a finished run leaves behind: table, metrics, pictures, data sets. Floor 4."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pipeline.data.datamodule import EpisodicDataModule
from pipeline.data.functions import FunctionEpisodes
from pipeline.data.loaders import EpisodeLoaders
from pipeline.figures import Curves, class_accuracy_figure, curves_figure
from pipeline.inside import episode_picture, look_inside
from pipeline.learners.base import MetaLearner
from pipeline.learners.evaluation import Scores, adapting_in, score_by_steps
from pipeline.learners.gradient import GradientLearner
from pipeline.scoreboard import INNER_STEPS, FixedEpisodes, Result, Scorers, is_own, score_all
from pipeline.tables import by_episode, metrics, print_frame, to_frame

if TYPE_CHECKING:
    from pipeline.tracking.run import Run

CURVES = 6  # test functions that are drawn
STEP_EPISODES = 200  # on which the accuracy after each number of inner steps is shown


def log_datasets(run: "Run", data: EpisodeLoaders, sets: Sequence[FixedEpisodes]) -> None:
    """Name the data sets of a run, with fingerprints and class counts."""
    used = {"training": data} | {test.name: test.data for test in sets if test.data is not data}
    for context, each in used.items():
        run.log_dataset(
            name=each.source.name,
            fingerprint=each.fingerprint,
            source=type(each.source).__name__,
            context="training" if context == "training" else "testing",
            profile=each.profile(),
        )


def test_and_report(
    run: "Run",
    learner: MetaLearner,
    sets: Sequence[FixedEpisodes],
    backbone: str,
    published: Sequence[Mapping[str, Any]],
    step: int,
    main: FixedEpisodes | None,
    csv: str,
    inside: int,
) -> dict[str, Any]:
    """Test once, print the table, and leave table, metrics and pictures with the run.

    Args:
        backbone: name of the learner's network, for the table.
        published: see `to_frame`.
        step: the training step that the weights are of.
        main: the set whose numbers are also those of the run, `test/acc`; None if it has them.
        csv: artifact path of the table; its rows are added to the run's results.json too.
        inside: episodes for each point of the pictures of `look_inside`; 0 draws none of them.

    Returns:
        `run_id` and the metrics, accuracies in 0..1.
    """
    learner.eval()
    scorers: Scorers | None = {} if inside else None
    results = score_all(learner, sets, backbone, scorers)
    frame = to_frame(results, published)
    numbers = metrics(results, main, learner)
    run.log_metrics(numbers, step)
    for name, accuracies in by_episode(results).items():
        run.log_csv(accuracies, f"episodes/{name}.csv")
    run.log_table(frame, csv, "results.json")
    if main and isinstance(learner, GradientLearner) and learner.eval_inner_steps > 1:
        _log_steps(run, learner, main)
    seen = "accuracy on classes" if "accuracy" in frame else "mean squared error on functions"
    print_frame(frame, f"{learner.label}: {seen} never seen (95 % interval)")
    own = [result for result in results if is_own(result, learner)]
    for result in own:
        _log_figures(run, learner, result)
    if scorers:
        look_inside(run, learner, own, scorers, step, inside)
    print(run.where())
    return {"run_id": run.run_id, **numbers}


def _log_steps(run: "Run", learner: GradientLearner, test: FixedEpisodes) -> None:
    """`adapt/acc_at_step`, against inner steps instead of training steps; selects nothing."""
    episodes = min(test.episodes, STEP_EPISODES)
    for step, score in score_by_steps(learner, test.data, test.sampler(), episodes).items():
        run.log_metrics({f"adapt/{test.data.measure}_at_step": score}, step)


def _log_figures(run: "Run", learner: MetaLearner, result: Result) -> None:
    test, scores, title = result.test, result.scores, result.title
    if not isinstance(test.data, EpisodicDataModule) or not isinstance(scores, Scores):
        run.log_figure(_adapted_curves(learner, test, title), f"figures/{test.key}.png")
        return
    names = test.data.pool.class_names
    by_class = {names[c]: value for c, value in scores.by_class().items()}
    run.log_figure(class_accuracy_figure(by_class, title), f"figures/classes_{test.key}.png")
    picture = episode_picture(learner, test, 0, title)
    run.log_figure(picture, f"figures/episode_{test.key}.png")


def _shown_steps(steps: int | None) -> str:
    if steps is None:
        return "adapted"
    return f"after {steps} steps" if steps > 1 else ("before adaptation", "after 1 step")[steps]


def _adapted_curves(learner: MetaLearner, test: FixedEpisodes, title: str) -> Any:
    """The first test functions, and what the learner makes of them after some inner steps."""
    sampler = test.sampler()
    assert isinstance(sampler, FunctionEpisodes)
    own = learner.eval_inner_steps if isinstance(learner, GradientLearner) else None
    steps = [None] if own is None else [*(k for k in (0, *INNER_STEPS) if k < own), own]
    low, high = sampler.family.x_range
    x = np.linspace(low, high, 201, dtype=np.float32)
    grid = torch.from_numpy(x).view(-1, 1, 1, 1).to(learner.device)
    truth = sampler.functions(range(CURVES))(np.tile(x, (CURVES, 1)))  # (tasks, points)
    curves = []
    for task, values in zip(sampler[range(CURVES)].tasks(), truth, strict=True):
        given = task.support_x.to(learner.device), task.support_y.to(learner.device)
        adapted = {}
        for k in steps:
            with torch.inference_mode(), adapting_in(learner, k):
                y = learner.adapt(*given)(grid)
            adapted[_shown_steps(k)] = y.flatten().cpu().numpy()
        points = task.support_x.flatten().numpy(), task.support_y.flatten().numpy()
        curves.append(Curves(values, points, adapted))
    return curves_figure(x, curves, title)
