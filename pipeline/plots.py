"""Interactive pictures of a report, by Plotly. Floor 1."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from plotly.colors import qualitative
from plotly.subplots import make_subplots

_COLOURS = [*qualitative.D3, *qualitative.Set2]
_PER_LINE = 3


def colours(labels: Sequence[str]) -> dict[str, str]:
    """A colour for each label, the same in every picture of a page."""
    distinct = list(dict.fromkeys(labels))
    return {label: _COLOURS[i % len(_COLOURS)] for i, label in enumerate(distinct)}


def _figure(height: int = 420, panels: Sequence[str] = ("",), share_y: bool = False) -> Any:
    """A figure of so many panels, three in a line; `height` is that of a line, in pixels."""
    lines = -(-len(panels) // _PER_LINE)
    figure = make_subplots(
        lines,
        min(_PER_LINE, len(panels)),
        subplot_titles=panels,
        shared_yaxes=share_y,
        horizontal_spacing=0.04 if share_y else 0.08,
        vertical_spacing=0.25 / lines,
    )
    figure.update_layout(
        template="plotly_white",
        height=height * lines,
        margin={"l": 60, "r": 20, "t": 40, "b": 50},
        font={"family": "system-ui, sans-serif", "size": 13},
    )
    return figure


def _place(i: int) -> dict[str, int]:
    """Line and column of panel i."""
    return {"row": i // _PER_LINE + 1, "col": i % _PER_LINE + 1}


def shots_figure(panels: Mapping[str, pd.DataFrame], colour: Mapping[str, str]) -> Any:
    """Accuracy against the number of shots, a panel a test set and protocol.

    Args:
        panels: by title; columns label, k_shot, accuracy and ci95 in percent.
        colour: of each label.
    """
    figure = _figure(panels=list(panels), share_y=True)
    seen = set[str]()
    for i, frame in enumerate(panels.values()):
        for label, rows in frame.groupby("label", sort=False):
            rows = rows.sort_values("k_shot")
            figure.add_scatter(
                x=rows["k_shot"],
                y=rows["accuracy"],
                error_y={"array": rows["ci95"], "thickness": 1.2, "width": 4},
                mode="lines+markers",
                line={"color": colour[str(label)]},
                name=label,
                legendgroup=label,
                showlegend=label not in seen,
                **_place(i),
            )
            seen.add(str(label))
        shots = sorted(set(frame["k_shot"]))
        figure.update_xaxes(type="log", tickvals=shots, ticktext=shots, title="shots", **_place(i))
    figure.update_yaxes(title="accuracy, %", col=1)
    return figure


def curves_figure(
    panels: Mapping[str, Sequence[tuple[str, str, pd.Series]]], x: str, colour: Mapping[str, str]
) -> Any:
    """Lines over steps, a panel a quantity.

    Args:
        panels: by title; label of the row, name of the run, values by step.
        x: what a step is.
        colour: of each label.
    """
    figure = _figure(panels=list(panels))
    seen = set[str]()
    for i, lines in enumerate(panels.values()):
        for label, run, values in lines:
            figure.add_scatter(
                x=values.index,
                y=values,
                mode="lines+markers" if len(values) < 40 else "lines",
                line={"color": colour[label], "width": 1.6},
                marker={"size": 5},
                name=label,
                legendgroup=label,
                showlegend=label not in seen,
                hovertemplate=f"{run}<br>%{{x}}: %{{y:.4f}}<extra></extra>",
                **_place(i),
            )
            seen.add(label)
    figure.update_xaxes(title=x)
    return figure


def differences_figure(rows: pd.DataFrame, colour: Mapping[str, str]) -> Any:
    """Differences to the best row with their intervals; rows as in `leaderboard.Ranking`."""
    figure = _figure(110 + 34 * len(rows))
    for row in rows.iloc[::-1].itertuples():
        figure.add_scatter(
            x=[row.to_best],
            y=[row.label],
            error_x={
                "array": [row.to_best_high - row.to_best],
                "arrayminus": [row.to_best - row.to_best_low],
                "thickness": 2,
                "width": 6,
            },
            mode="markers",
            marker={
                "size": 10,
                "color": colour[row.label],
                "symbol": "circle-open" if row.mark == "tied" else "circle",
            },
            showlegend=False,
            hovertemplate="%{y}: %{x:.2f} points<extra></extra>",
        )
    figure.add_vline(x=0, line={"width": 1, "color": "#555"})
    figure.update_xaxes(title="difference to the best, points (open: not distinguishable)")
    return figure


def history_figure(trials: pd.DataFrame) -> Any:
    """The value of every trial that has one, and the best of the complete ones so far."""
    figure = _figure()
    for state, rows in trials[trials["value"].notna()].groupby("state"):
        colour = "#1f77b4" if state == "COMPLETE" else "#bbbbbb"
        marker = {"color": colour, "size": 8}
        name = str(state).lower()
        figure.add_scatter(
            x=rows["number"], y=rows["value"], mode="markers", name=name, marker=marker
        )
    done = trials[trials["state"] == "COMPLETE"].sort_values("number")
    step = {"shape": "hv", "color": "#d62728"}
    best = done["value"].cummax()
    figure.add_scatter(x=done["number"], y=best, mode="lines", name="best so far", line=step)
    figure.update_xaxes(title="trial").update_yaxes(title="val/acc")
    return figure


def slices_figure(trials: pd.DataFrame) -> Any:
    """The value of complete trials against each parameter, coloured by the trial's number."""
    done = trials[(trials["state"] == "COMPLETE") & trials["value"].notna()]
    keys = [key for key in trials if key.startswith("params_")]
    figure = _figure(320, [""] * len(keys), share_y=True)
    for i, key in enumerate(keys):
        rows = done[done[key].notna()]
        figure.add_scatter(
            x=rows[key],
            y=rows["value"],
            mode="markers",
            marker={
                "color": rows["number"],
                "coloraxis": "coloraxis",
                "size": 9,
                "line": {"width": 0.7, "color": "#333"},
            },
            showlegend=False,
            text=rows["number"],
            hovertemplate="trial %{text}<br>%{x}: %{y:.4f}<extra></extra>",
            **_place(i),
        )
        axis = _axis(rows[key])
        figure.update_xaxes(title=key.removeprefix("params_"), **axis, **_place(i))
    figure.update_layout(coloraxis={"colorscale": "Blues", "colorbar": {"title": "trial"}})
    figure.update_yaxes(title="val/acc", col=1)
    return figure


def _axis(values: pd.Series) -> dict[str, Any]:
    """Logarithmic for what spans more than a factor of ten."""
    if not pd.api.types.is_numeric_dtype(values) or pd.api.types.is_bool_dtype(values):
        return {"type": "category"}
    if len(values) and values.min() > 0 and values.max() > 10 * values.min():
        return {"type": "log", "dtick": 1, "exponentformat": "power"}
    return {"type": "linear"}


def importance_figure(importance: Mapping[str, float]) -> Any:
    """How much of the variation of the value each parameter explains."""
    ranked = sorted(importance.items(), key=lambda item: item[1])
    figure = _figure(110 + 34 * len(ranked))
    values = [value for _, value in ranked]
    figure.add_bar(
        x=values,
        y=[key for key, _ in ranked],
        orientation="h",
        marker={"color": "#1f77b4"},
        text=[f"{value:.2f}" for value in values],
        textposition="auto",
    )
    figure.update_xaxes(title="importance", range=[0, 1.05 * max(values)])
    return figure
