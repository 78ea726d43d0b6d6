"""What a training has seen, so that nothing of it is tested on. Floor 4."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from pipeline.data.loaders import EpisodeLoaders
from pipeline.errors import UserError
from pipeline.scoreboard import FixedEpisodes


class Seen(NamedTuple):
    """What a training has seen of a data set; stored with its checkpoints.

    Attributes:
        source: kind of data set; within it, a name stands for the same class everywhere.
        data: its name.
        fingerprint: of its pool.
        classes: names of those of its training and validation split.
    """

    source: str
    data: str
    fingerprint: str
    classes: list[str]

    def same_as(self, other: "Seen") -> bool:
        """Whether images and classes are the same, wherever they lie now."""
        return (self.fingerprint, self.classes) == (other.fingerprint, other.classes)


def seen_by(data: EpisodeLoaders) -> Seen:
    """What a training on this data sees."""
    names = data.class_names("train") + data.class_names("val")
    kind = type(data.source)
    return Seen(f"{kind.__module__}.{kind.__qualname__}", data.source.name, data.fingerprint, names)


def refuse_seen(seen: Sequence[Seen], sets: Iterable[FixedEpisodes]) -> None:
    """No class of a test set may have been trained or selected on.

    Args:
        seen: by the training, and by the run that it started from.

    Raises:
        UserError: naming the first such class of every set.
    """
    problems = {}
    for test in sets:
        names = set(test.data.class_names("test"))
        source = seen_by(test.data).source
        for each in (each for each in seen if each.source == source):
            if shared := sorted(names & set(each.classes)):
                problems[test.name] = (
                    f"test set {test.name}: {len(shared)} of its classes ({shared[0]}, ...) are in "
                    f"the training or validation split of {each.data}; it cannot test this "
                    "run (if it is another class of the same name, rename it)"
                )
    if problems:
        raise UserError("\n".join(problems.values()))
