"""Hands: one character's strokes drawn as different people would. Floor 1.

A hand is a vector of noise: slant, proportions, a bend of the plane, size, place and pen; every
stroke of a drawing wavers on its own besides. Lengths are KanjiVG's units, 109 a side of the
character's box, until `_place` turns them into pixels.
"""

import re
from collections.abc import Sequence

import numpy as np

Stroke = np.ndarray
"""(P, 2) float64: points along a stroke, x right and y down, in units."""


def parse(d: str) -> Stroke:
    """Sample an SVG path, `M` and then cubic Béziers (`C c S s`), evenly along its length.

    Returns:
        (P, 2), neighbours at most 2 units apart, P >= 2.
    """
    t = np.linspace(0, 1, 17)[1:, None]
    points = []
    at = control = np.zeros(2)
    for command, body in re.findall(r"([MmCcSs])([^A-Za-z]*)", d):
        numbers = re.findall(r"-?(?:\d+\.?\d*|\.\d+)", body)
        arity = {"m": 1, "s": 2, "c": 3}[command.lower()]
        for group in np.array(numbers, dtype=float).reshape(-1, arity, 2):
            ends = group + at if command.islower() else group
            if arity == 1:
                at = control = ends[0]
                points.append(at[None])
                continue
            c1 = ends[0] if arity == 3 else 2 * at - control  # S mirrors the last control point
            control, end = ends[-2], ends[-1]
            near = (1 - t) ** 3 * at + 3 * (1 - t) ** 2 * t * c1
            points.append(near + 3 * (1 - t) * t**2 * control + t**3 * end)
            at = end
    path = np.concatenate(points)
    along = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(path, axis=0).T))])
    even = np.linspace(0, along[-1], max(2, int(np.ceil(along[-1] / 2)) + 1))
    return np.stack([np.interp(even, along, path[:, axis]) for axis in (0, 1)], axis=1)


def draw(
    strokes: Sequence[Stroke], codepoint: int, seed: int, drawings: int, size: int
) -> np.ndarray:
    """Draw one character by many hands; drawing i does not depend on how many there are.

    Returns:
        (drawings, size, size) uint8, ink 255, anti-aliased.
    """
    random = [stream(seed, codepoint, i) for i in range(drawings)]
    hand = np.stack([_noise(r, 15) for r in random])  # (D, 15)
    wobble = np.stack([_noise(r, len(strokes) * 10) for r in random])
    wobble = wobble.reshape(drawings, len(strokes), 5, 2)
    points, pressure = [], []
    for i, stroke in enumerate(strokes):
        moved, width = _waver(stroke, wobble[:, i], hand)
        points.append(moved)
        pressure.append(width)
    placed = _place(_warp(np.concatenate(points, axis=1), hand), hand, size)
    radius = _pen(strokes) * size * np.exp(0.35 * hand[:, :1]) * np.concatenate(pressure, axis=1)
    return _stamp(placed, radius, size)


def _pen(strokes: Sequence[Stroke]) -> float:
    """Usual pen radius, as a part of the image's side: finer where the strokes are crowded."""
    points = np.concatenate(strokes)
    length = sum(np.hypot(*np.diff(stroke, axis=0).T).sum() for stroke in strokes)
    crowd = length / (points.max(axis=0) - points.min(axis=0)).max()
    return float(0.043 * min(1.0, (3.5 / crowd) ** 0.6))


def _waver(stroke: Stroke, wobble: np.ndarray, hand: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Move the two ends of a stroke apart from each other and bend what lies between.

    Args:
        stroke: (P, 2).
        wobble: (D, 5, 2) noise of this stroke: of its start, its end and three sine waves.
        hand: (D, 15) noise of the whole drawing; one number says how careless the hand is.

    Returns:
        Points (D, P, 2) and relative pen pressure (D, P).
    """
    t = np.linspace(0, 1, len(stroke))
    basis = np.stack([1 - t, t, *(np.sin(k * np.pi * t) for k in (1, 2, 3))])  # (5, P)
    length = np.hypot(*np.diff(stroke, axis=0).T).sum()
    scale = np.array([2.2, 2.2, 0.045 * length, 0.025 * length, 0.012 * length])
    careless = np.exp(0.35 * hand[:, 1])
    coefficients = wobble * scale[:, None] * careless[:, None, None]
    moved = stroke + np.einsum("dkc,kp->dpc", coefficients, basis)
    pressure = 1 + 0.1 * hand[:, 2, None] * (2 * t - 1)  # some press at the start, some at the end
    return moved, pressure


def _warp(points: np.ndarray, hand: np.ndarray) -> np.ndarray:
    """Bend the plane, then shear, stretch and turn it: (D, P, 2) in units, centred on 0."""
    low, high = points.min(axis=1, keepdims=True), points.max(axis=1, keepdims=True)
    centred = points - (low + high) / 2
    x, y = (centred / np.maximum(high - low, 1e-6).max(axis=2, keepdims=True)).transpose(2, 0, 1)
    a = 0.08 * hand[:, 3:9].T[:, :, None]  # (6, D, 1)
    u = x + a[0] * x * x + a[1] * x * y + a[2] * y * y
    v = y + a[3] * x * x + a[4] * x * y + a[5] * y * y
    turn, shear = 0.10 * hand[:, 9:10], 0.18 * hand[:, 10:11]
    stretch = np.exp(0.10 * hand[:, 11:12])
    u, v = (u - shear * v) * stretch, v / stretch
    return np.stack([u * np.cos(turn) - v * np.sin(turn), u * np.sin(turn) + v * np.cos(turn)], -1)


def _place(points: np.ndarray, hand: np.ndarray, size: int) -> np.ndarray:
    """Fit the longer side to about 20 of 28 pixels and centre it with a little jitter."""
    low, high = points.min(axis=1, keepdims=True), points.max(axis=1, keepdims=True)
    side = (high - low).max(axis=2, keepdims=True)
    fit = size * 0.66 * np.exp(0.07 * hand[:, 12, None, None]) / side
    jitter = 0.015 * size * hand[:, None, 13:15]
    return (points - (low + high) / 2) * fit + (size - 1) / 2 + jitter


def _stamp(points: np.ndarray, radius: np.ndarray, size: int) -> np.ndarray:
    """Stamp a disc at every point: ink = clip(radius + 1/2 - distance, 0, 1), the maximum wins.

    Args:
        points: (D, P, 2), in pixels.
        radius: (D, P), in pixels.
        size: side of the image, in pixels.

    Returns:
        (D, size, size) uint8.
    """
    reach = int(np.ceil(radius.max() + 0.5))
    side = size + 2 * reach + 2
    points = np.clip(points, -0.5, size - 0.5) + reach + 1
    nearest = np.rint(points).astype(np.int64)
    steps = np.arange(-reach, reach + 1)
    grid = nearest[..., None] + steps  # (D, P, 2, K): the pixels near each point
    square = (grid - points[..., None]).astype(np.float32) ** 2
    distance = np.sqrt(square[:, :, 1, :, None] + square[:, :, 0, None, :])  # (D, P, K, K): y, x
    ink = np.clip(radius[..., None, None].astype(np.float32) + 0.5 - distance, 0, 1)
    drawing = np.arange(len(points))[:, None, None, None]
    pixel = (drawing * side + grid[:, :, 1, :, None]) * side + grid[:, :, 0, None, :]
    canvas = np.zeros(len(points) * side * side, dtype=np.float32)
    np.maximum.at(canvas, pixel.ravel(), ink.ravel())
    inside = slice(reach + 1, reach + 1 + size)
    images = canvas.reshape(-1, side, side)[:, inside, inside]
    return np.rint(images * 255).astype(np.uint8)


def stream(seed: int, codepoint: int, drawing: int) -> np.random.Generator:
    """A counter-based stream named by its key alone, whatever was drawn before or elsewhere."""
    return np.random.Generator(np.random.Philox(key=[seed, codepoint << 32 | drawing]))


def _noise(random: np.random.Generator, n: int) -> np.ndarray:
    """(n,) of mean 0 and variance 1; uniform, so that no drawing is wrecked by a wild number."""
    return np.sqrt(3) * (2 * random.random(n) - 1)
