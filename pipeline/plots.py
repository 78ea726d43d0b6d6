"""Interactive pictures of a report, by Plotly. Floor 1."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.colors import qualitative
from plotly.subplots import make_subplots

_COLOURS = [*qualitative.D3, *qualitative.Set2]
_SYMBOLS = ["circle", "square", "diamond", "cross", "triangle-up"]


def colours(labels: Sequence[str]) -> dict[str, str]:
    """A colour for each label, the same in every picture of a page."""
    distinct = list(dict.fromkeys(labels))
    return {label: _COLOURS[i % len(_COLOURS)] for i, label in enumerate(distinct)}


def _figure(columns: Sequence[str] = (), rows: int = 1, height: int = 420, **options: Any) -> Any:
    if columns:
        figure = make_subplots(rows, -(-len(columns) // rows), subplot_titles=columns, **options)
    else:
        figure = go.Figure()
    figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 60, "r": 20, "t": 40, "b": 50},
        font={"family": "system-ui, sans-serif", "size": 13},
        legend={"groupclick": "togglegroup"},
    )
    return figure


def shots_figure(panels: Mapping[str, pd.DataFrame], colour: Mapping[str, str]) -> Any:
    """Accuracy against the number of shots, a panel a test set and protocol.

    Args:
        panels: by title; columns label, k_shot, accuracy and ci95 in percent.
    """
    figure = _figure(list(panels), shared_yaxes=True, horizontal_spacing=0.04)
    seen = set[str]()
    for column, frame in enumerate(panels.values(), 1):
        for i, (label, rows) in enumerate(frame.groupby("label", sort=False)):
            rows = rows.sort_values("k_shot")
            error = {"type": "data", "array": rows["ci95"], "thickness": 1.2, "width": 4}
            figure.add_scatter(
                x=rows["k_shot"], y=rows["accuracy"], error_y=error, mode="lines+markers",
                line={"color": colour[str(label)]}, name=label, legendgroup=label,
                marker={"symbol": _SYMBOLS[i % len(_SYMBOLS)], "size": 8},
                showlegend=label not in seen, row=1, col=column,
            )  # fmt: skip
            seen.add(str(label))
        shots = sorted(set(frame["k_shot"]))
        figure.update_xaxes(type="log", tickvals=shots, ticktext=shots, title="shots", col=column)
    figure.update_yaxes(title="accuracy, %", col=1)
    return figure


def curves_figure(
    panels: Mapping[str, Sequence[tuple[str, str, pd.Series]]], x: str, colour: Mapping[str, str]
) -> Any:
    """Lines over steps, a panel a quantity.

    Args:
        panels: by title; label of the row, name of the run, values by step.
        x: what a step is.
    """
    figure = _figure(list(panels), horizontal_spacing=0.08)
    seen = set[str]()
    for column, lines in enumerate(panels.values(), 1):
        for label, run, values in lines:
            figure.add_scatter(
                x=values.index, y=values, mode="lines+markers" if len(values) < 40 else "lines",
                line={"color": colour[label], "width": 1.6}, marker={"size": 5}, name=label,
                legendgroup=label, showlegend=label not in seen, row=1, col=column,
                hovertemplate=f"{run}<br>%{{x}}: %{{y:.4f}}<extra></extra>",
            )  # fmt: skip
            seen.add(label)
        figure.update_xaxes(title=x, col=column)
    return figure


def differences_figure(rows: pd.DataFrame, colour: Mapping[str, str]) -> Any:
    """Differences to the best row with their intervals; columns as in `leaderboard.Ranking`."""
    rows = rows[rows["to_best"].notna()].iloc[::-1]
    figure = _figure(height=110 + 34 * len(rows))
    for row in rows.itertuples():
        arms = {
            "array": [row.to_best_high - row.to_best],
            "arrayminus": [row.to_best - row.to_best_low],
        }
        figure.add_scatter(
            x=[row.to_best], y=[row.label], mode="markers", showlegend=False,
            error_x={"type": "data", "symmetric": False, "thickness": 2, "width": 6, **arms},
            marker={"size": 10, "color": colour[row.label],
                    "symbol": "circle-open" if row.mark == "tied" else "circle"},
            hovertemplate="%{y}: %{x:.2f} points<extra></extra>",
        )  # fmt: skip
    figure.add_vline(x=0, line={"width": 1, "color": "#555"})
    figure.update_xaxes(
        title="difference to the best, percentage points (open: not distinguishable)"
    )
    return figure


def history_figure(trials: pd.DataFrame) -> Any:
    """The value of every finished trial and the best so far; columns number, state, value."""
    figure = _figure()
    done = trials[trials["state"] == "COMPLETE"]
    for state, rows in trials[trials["value"].notna()].groupby("state"):
        colour = "#1f77b4" if state == "COMPLETE" else "#bbbbbb"
        figure.add_scatter(
            x=rows["number"], y=rows["value"], mode="markers", name=str(state).lower(),
            marker={"color": colour, "size": 8},
        )  # fmt: skip
    figure.add_scatter(
        x=done["number"], y=done["value"].cummax(), mode="lines", name="best so far",
        line={"shape": "hv", "color": "#d62728"},
    )  # fmt: skip
    figure.update_xaxes(title="trial").update_yaxes(title="val/acc")
    return figure


def slices_figure(trials: pd.DataFrame) -> Any:
    """The value against each parameter, coloured by the number of the trial."""
    done = trials[(trials["state"] == "COMPLETE") & trials["value"].notna()]
    keys = [k for k in trials if k.startswith("params_")]
    lines = -(-len(keys) // 3)
    names = [k.removeprefix("params_") for k in keys]
    per_line = min(3, len(keys))
    figure = make_subplots(lines, per_line, shared_yaxes=True, horizontal_spacing=0.04,
                           vertical_spacing=0.25 / lines)  # fmt: skip
    figure.update_layout(_figure(height=60 + 300 * lines).layout)
    for i, key in enumerate(keys):
        row, column = i // per_line + 1, i % per_line + 1
        rows = done[done[key].notna()]
        figure.add_scatter(
            x=rows[key], y=rows["value"], mode="markers", showlegend=False, row=row, col=column,
            marker={"color": rows["number"], "colorscale": "Blues", "size": 9, "cmin": -5,
                    "line": {"width": 0.7, "color": "#333"}, "showscale": i == 0,
                    "colorbar": {"title": "trial"}},
            text=rows["number"], hovertemplate="trial %{text}<br>%{x}: %{y:.4f}<extra></extra>",
        )  # fmt: skip
        figure.update_xaxes(title=names[i], type=_axis(rows[key]), row=row, col=column)
    figure.update_yaxes(title="val/acc", col=1)
    return figure


def _axis(values: pd.Series) -> str:
    """Logarithmic for what spans more than a factor of ten."""
    if not pd.api.types.is_numeric_dtype(values) or pd.api.types.is_bool_dtype(values):
        return "category"
    return (
        "log" if len(values) and values.min() > 0 and values.max() > 10 * values.min() else "linear"
    )


def importance_figure(importance: Mapping[str, float]) -> Any:
    """How much of the variation of the value each parameter explains."""
    ranked = sorted(importance.items(), key=lambda item: item[1])
    figure = _figure(height=110 + 34 * len(ranked))
    values = [value for _, value in ranked]
    figure.add_bar(
        x=values, y=[key for key, _ in ranked], orientation="h", marker={"color": "#1f77b4"},
        text=[f"{value:.2f}" for value in values], textposition="auto",
    )  # fmt: skip
    figure.update_xaxes(title="importance", range=[0, None])
    return figure
