"""Sinusoids: the regression tasks of MAML. Floor 1.

Finn, Abbeel, Levine 2017, section 5.1, https://arxiv.org/abs/1703.03400.
"""

import numpy as np

from pipeline.annotations import Interval
from pipeline.data.episodes import uniform
from pipeline.data.functions import Function, FunctionFamily
from pipeline.errors import UserError


class Sinusoid(FunctionFamily):
    """A task is y = amplitude * sin(x - phase), with an amplitude and a phase of its own.

    Args:
        amplitude, phase, x_range: intervals that tasks and arguments are drawn from, uniformly.
    """

    name = "sinusoid"

    def __init__(self, *, amplitude: Interval, phase: Interval, x_range: Interval) -> None:
        for key, (low, high) in (("amplitude", amplitude), ("phase", phase), ("x_range", x_range)):
            if not low <= high:
                raise UserError(f"data.{key}: found [{low}, {high}]; give [low, high]")
        self.amplitude, self.phase = _floats(amplitude), _floats(phase)
        self.x_range = _floats(x_range)

    def parameters(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Amplitude and phase of each key: (tasks,) uint64 -> (tasks,) twice."""
        low, high = np.array([self.amplitude, self.phase]).T
        drawn = low + (high - low) * uniform(keys, 2, stream=0)  # (tasks, 2)
        return drawn[:, 0], drawn[:, 1]

    def at(self, keys: np.ndarray) -> Function:
        """See `FunctionFamily.at`."""
        amplitude, phase = self.parameters(keys)
        return lambda x: amplitude[:, None] * np.sin(x - phase[:, None])


def _floats(interval: Interval) -> Interval:
    """A tuple, whatever YAML gave: the fingerprint is of it."""
    return float(interval[0]), float(interval[1])
