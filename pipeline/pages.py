"""A report on paper: terminal, CSV, Markdown, LaTeX and one HTML page. Floor 4."""

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from plotly.offline import get_plotlyjs
from rich.console import Console
from rich.table import Table

from pipeline.html import render
from pipeline.leaderboard import SIGNIFICANT, Ranking
from pipeline.sections import Report

LEGEND = (
    "Accuracy with its 95 % interval over what the column says. Difference to the best in "
    "percentage points with its 95 % t interval, paired over the episodes, which are the same for "
    f"all rows. ≈: not distinguishable from the best, p ≥ {SIGNIFICANT} by Wilcoxon's signed "
    "ranks, Holm-corrected over all pairs of the ranking. Accuracies of several seeds are averaged "
    "episode by episode before they are paired: differences hold for the models that were trained."
)
UNPAIRED = (
    "Not paired: a run made before accuracies were kept by episode; python -m pipeline.evaluate "
    "run=RUN_ID keeps them."
)
_LEFT = {"learner", "backbone", "trained on", "interval over", "a", "b"}


def standing(row: Any) -> str:
    """How a row stands to the best: the difference, or why there is none."""
    if row.mark not in ("tied", "behind"):
        return str(row.mark)
    sign = "≈ " if row.mark == "tied" else ""
    return sign + _difference(row.to_best, row.to_best_low, row.to_best_high)


def shown(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of a ranking as text, without columns that have nothing to tell."""
    table = [
        {
            "learner": row.label,
            "backbone": row.backbone,
            "trained on": "" if row.trained_on == row.data else _told(row.trained_on, "{}"),
            "accuracy": f"{row.accuracy:.2f}{_told(row.ci95, ' ± {:.2f}')} %",
            "interval over": row.interval_over,
            "to the best": standing(row),
            "p (Holm)": _p(row.p_holm),
            "parameters": _told(row.parameters, "{:,.0f}"),
            "train time": "" if pd.isna(row.train_seconds) else _duration(row.train_seconds),
            "adapt a task": _told(row.adapt_ms, "{:.1f} ms"),
            "published": _told(row.published, "{:.1f} %"),
        }
        for row in rows.itertuples()
    ]
    frame = pd.DataFrame(table)
    return frame.loc[:, (frame != "").any()]


def shown_pairs(pairs: pd.DataFrame) -> pd.DataFrame:
    """The pairs of a ranking as text."""
    rows = [
        {
            "a": row.a,
            "b": row.b,
            "a − b, points": _difference(row.difference, row.low, row.high),
            "p": _p(row.p),
            "p (Holm)": _p(row.p_holm),
            "distinguishable": "yes" if row.p_holm < SIGNIFICANT else "no",
        }
        for row in pairs.itertuples()
    ]
    return pd.DataFrame(rows)


def _told(value: Any, form: str) -> str:
    """The value in that form; nothing if it is not known."""
    return "" if pd.isna(value) else form.format(value)


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else _told(value, "{:.3f}")


def _difference(mean: float, low: float, high: float) -> str:
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]".replace("-", "−")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def footnotes(ranking: Ranking) -> list[str]:
    """What stands under a table of its own, apart from the legend of all."""
    old = ranking.rows["mark"].str.contains("not paired").any()
    sources = ranking.rows.loc[ranking.rows["published"].notna(), "published_source"]
    devices = {device for device in ranking.rows["device"] if device}
    notes = [*ranking.notes, *([UNPAIRED] if old else [])]
    notes += [f"Published: {'; '.join(dict.fromkeys(sources))}."] if len(sources) else []
    return notes + ([f"Times on {'; '.join(sorted(devices))}."] if devices else [])


def print_report(report: Report) -> None:
    """The rankings on standard output."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    for ranking in report.rankings:
        table = Table(title=ranking.title, title_justify="left")
        frame = shown(ranking.rows).drop(columns=["trained on", "published"], errors="ignore")
        for name in frame:
            table.add_column(name, justify="left" if name in _LEFT else "right")
        for cells in frame.itertuples(index=False):
            table.add_row(*cells)
        console.print(table)
        for note in footnotes(ranking):
            console.print(note, style="dim", highlight=False)
    if report.rankings:
        console.print(LEGEND, style="dim", highlight=False)


def write(report: Report, folder: Path) -> list[Path]:
    """Write leaderboard.csv, pairs.csv, report.md, report.tex and report.html into a folder."""
    texts = {"report.html": _html(report)}
    if report.rankings:
        texts |= {
            "leaderboard.csv": _joined(report.rankings, lambda r: r.rows).to_csv(index=False),
            "pairs.csv": _joined(report.rankings, lambda r: r.pairs).to_csv(index=False),
            "report.md": _markdown(report),
            "report.tex": _latex(report),
        }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


def _joined(rankings: Sequence[Ranking], part: Callable[[Ranking], pd.DataFrame]) -> pd.DataFrame:
    frames = []
    for ranking in rankings:
        frame = part(ranking).reset_index(drop=True)
        for key in ("k_shot", "n_way", "data"):
            if key not in frame:
                frame.insert(0, key, getattr(ranking, key))
        frame.insert(0, "ranking", ranking.title)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def _markdown(report: Report) -> str:
    lines = [f"# {report.title}", ""]
    for ranking in report.rankings:
        lines += [f"## {ranking.title}", "", *_markdown_table(shown(ranking.rows))]
        lines += [line for note in footnotes(ranking) for line in ("", note)]
        if len(ranking.pairs):
            lines += ["", *_markdown_table(shown_pairs(ranking.pairs))]
        lines.append("")
    return "\n".join([*lines, LEGEND, ""])


def _markdown_table(frame: pd.DataFrame) -> list[str]:
    rule = ["---" if name in _LEFT else "---:" for name in frame]
    rows = [[str(cell).replace("|", r"\|") for cell in row] for row in frame.to_numpy()]
    return [f"| {' | '.join(row)} |" for row in [list(frame), rule, *rows]]


def _latex(report: Report) -> str:
    """Tables to be read in, one a ranking and one for its pairs."""
    parts = [r"% \usepackage{booktabs} in the preamble; \input{report.tex} where the tables go"]
    for ranking in report.rankings:
        legend = [LEGEND] if ranking is report.rankings[0] else []
        caption = " ".join([f"{ranking.title}.", *footnotes(ranking), *legend])
        parts.append(_latex_table(shown(ranking.rows), caption))
        if len(ranking.pairs):
            caption = f"{ranking.title}: differences of all pairs with their 95 % intervals."
            parts.append(_latex_table(shown_pairs(ranking.pairs), caption))
    return "\n".join(parts)


def _latex_table(frame: pd.DataFrame, caption: str) -> str:
    plain = frame.map(_tex).rename(columns=_tex)
    table = plain.style.hide(axis="index").to_latex(
        hrules=True,
        column_format="".join("l" if name in _LEFT else "r" for name in frame),
        caption=_tex(caption),
        position="htbp",
        position_float="centering",
    )
    return table.replace(r"\begin{tabular}", "\\footnotesize\n\\begin{tabular}")


_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
        "±": r"$\pm$", "≈": r"$\approx$", "−": r"$-$", "≥": r"$\geq$", "<": "$<$", ">": "$>$",
        "[": "{[}"} | {sign: f"\\{sign}" for sign in "&%$#_{}"}  # fmt: skip


def _tex(text: object) -> str:
    return re.sub(r".", lambda match: _TEX.get(match[0], match[0]), str(text))


def _html(report: Report) -> str:
    return render(
        "report.html",
        {"shown": shown, "shown_pairs": shown_pairs, "footnotes": footnotes},
        report=report,
        legend=LEGEND,
        left=_LEFT,
        picture=_picture,
        plotly=get_plotlyjs(),
    )


def _picture(figure: Any) -> str:
    return figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        config={"displaylogo": False, "responsive": True, "modeBarButtons": [["toImage"]]},
    )
