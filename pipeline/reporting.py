"""What a finished run leaves behind: table, metrics, pictures, data sets. Floor 4."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from pipeline.data.datamodule import EpisodicDataModule
from pipeline.data.episodes import EpisodeDataset
from pipeline.figures import class_accuracy_figure, prediction_figure
from pipeline.learners.base import MetaLearner
from pipeline.learners.evaluation import accuracy_by_steps
from pipeline.learners.gradient import GradientLearner
from pipeline.scoreboard import (
    FixedEpisodes,
    Result,
    by_episode,
    metrics,
    print_frame,
    score_all,
    to_frame,
)

if TYPE_CHECKING:
    from pipeline.tracking.run import Run

STEP_EPISODES = 200  # on which the accuracy after each number of inner steps is shown


def log_datasets(run: "Run", data: EpisodicDataModule, sets: Sequence[FixedEpisodes]) -> None:
    """Name the data sets of a run, with fingerprints and class counts."""
    used = {"training": data} | {test.name: test.data for test in sets if test.data is not data}
    for context, each in used.items():
        counts = {split: len(each.classes(split)) for split in ("train", "val", "test")}
        run.log_dataset(
            name=each.source.name,
            fingerprint=each.pool.fingerprint,
            source=type(each.source).__name__,
            context="training" if context == "training" else "testing",
            profile={"images": len(each.pool.labels), "classes": counts},
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
) -> dict[str, Any]:
    """Test once, print the table, and leave table, metrics and pictures with the run.

    Args:
        backbone: name of the learner's network, for the table.
        published: see `to_frame`.
        step: the training step that the weights are of.
        main: the set whose numbers are also those of the run, `test/acc`; None if it has them.
        csv: artifact path of the table; its rows are added to the run's results.json too.

    Returns:
        `run_id` and the metrics, accuracies in 0..1.
    """
    learner.eval()
    results = score_all(learner, sets, backbone)
    frame = to_frame(results, published)
    numbers = metrics(results, main, learner.label)
    run.log_metrics(numbers, step)
    for name, accuracies in by_episode(results).items():
        run.log_csv(accuracies, f"episodes/{name}.csv")
    run.log_table(frame, csv, "results.json")
    if main and isinstance(learner, GradientLearner) and learner.eval_inner_steps > 1:
        _log_steps(run, learner, main)
    print_frame(frame, f"{learner.label}: accuracy on classes never seen (95 % interval)")
    for result in results:
        if result.learner == learner.label:
            _log_figures(run, learner, result)
    print(run.where())
    return {"run_id": run.run_id, **numbers}


def _log_steps(run: "Run", learner: GradientLearner, test: FixedEpisodes) -> None:
    """`adapt/acc_at_step`, against inner steps instead of training steps; selects nothing."""
    episodes = min(test.episodes, STEP_EPISODES)
    for step, acc in accuracy_by_steps(learner, test.data, test.sampler(), episodes).items():
        run.log_metrics({"adapt/acc_at_step": acc}, step)


def _log_figures(run: "Run", learner: MetaLearner, result: Result) -> None:
    test, scores = result.test, result.scores
    names = test.data.pool.class_names
    by_class = {names[c]: value for c, value in scores.by_class().items()}
    title = f"{result.learner} on {test.name}, {test.n_way}-way {test.k_shot}-shot"
    run.log_figure(class_accuracy_figure(by_class, title), f"figures/classes_{test.key}.png")
    run.log_figure(_first_episode(learner, test, title), f"figures/episode_{test.key}.png")


def _first_episode(learner: MetaLearner, test: FixedEpisodes, title: str) -> Any:
    """A picture of test episode 0 with the predictions of the learner."""
    sampler = test.sampler()
    episode = EpisodeDataset(test.data.pool, sampler)[0]
    device = learner.device
    with torch.inference_mode():
        support = test.data.prepare(episode.support_x.to(device))
        query = test.data.prepare(episode.query_x.to(device))
        logits = learner.adapt(support, episode.support_y.to(device))(query)
    predicted = logits.argmax(1).cpu()
    right = 100 * float((predicted == episode.query_y).float().mean())
    names = [test.data.pool.class_names[c] for c in sampler.sample([0]).classes[0]]
    caption = f"{title}, episode 0: {right:.0f} % right"
    return prediction_figure(episode, predicted, names, caption)
