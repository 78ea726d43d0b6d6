"""The page of `pipeline.demo`, made with Gradio: what stands on it and what it does. Floor 5."""

from collections.abc import Callable
from functools import wraps
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import numpy as np
from omegaconf import DictConfig

from pipeline import sources, trial, uploads
from pipeline.errors import UserError
from pipeline.trained import Given
from pipeline.trial import Learned

TITLE = "Teach it your own classes"
START = 2  # rows at first, unless the learner takes another number
STALE = 600  # seconds after which what lies in the folder of uploads has no owner
_INTRO = f"""# {TITLE}
Name two classes or more, drop a few photos of each (five are a good start) and press **Learn**: it
says how well it is going to do. Then drop photos that it has not seen.

"""
_KEPT = (
    "Photos go no further than the machine that runs this page, and uploads are deleted once read."
)

_PROGRESS = gr.Progress()  # as a default it tells Gradio to pass one

Photos = list[np.ndarray]


class Row(NamedTuple):
    """A class on the page: its row, its name, where to drop photos, these, how they look."""

    box: gr.Row
    name: gr.Textbox
    drop: gr.File
    photos: gr.State
    strip: gr.HTML
    clear: gr.Button


def build(given: Given, cfg: DictConfig, folder: Path) -> gr.Blocks:
    """Rows of classes, what was learned of them, photos to be classified.

    What a visitor gives is kept in the state of the session, decoded; see `uploads.read_uploads`.

    Args:
        given: the learner.
        cfg: keys max_classes, max_photos, reject.
        folder: where Gradio keeps uploads.
    """
    with gr.Blocks(analytics_enabled=False, title=TITLE, delete_cache=(STALE, 10 * STALE)) as page:
        gr.Markdown(f"{_INTRO}{_KEPT} {trial.about(given)}\n## 1. Your classes")
        start = given.learner.n_way or START
        rows = [_row(i, i < start) for i in range(max(start, cfg.max_classes))]
        count = gr.State(start)
        with gr.Row():
            more, digits, again = (
                gr.Button(text, min_width=90, size="md")
                for text in ("Add class", "Try digits", "Start over")
            )
        gr.Markdown("## 2. Learn them")
        button, learned, estimate = gr.Button("Learn", variant="primary"), gr.State(), gr.HTML()
        gr.Markdown("## 3. Photos that it has not seen")
        asked, queries, answers = _drop("Photos to classify"), gr.State([]), gr.HTML()

    do = _Handlers(given, cfg, folder, rows)
    with page:
        stale = [learned, estimate, answers]
        for row in rows:
            one = [row.drop, row.photos]
            on(row.drop.upload, do.add, one, [*one, row.strip, *stale])
            cleared = [row.name, row.photos, row.strip, *stale]
            on(row.clear.click, lambda: ("", [], "", None, "", ""), None, cleared)
            on(row.name.input, lambda: (None, "", ""), None, stale, show_progress="hidden")
        on(more.click, do.show, count, [count, more, *(row.box for row in rows)])
        on(again.click, None, js="() => location.reload()")
        inputs = {part for row in rows for part in (row.name, row.photos)}
        after = (do.answers, [learned, queries], answers)
        on(on(button.click, do.learn, inputs, [learned, estimate]).success, *after)
        on(asked.upload, do.ask, [asked, learned], [asked, queries, answers])
        filled = [queries, count, *(p for r in rows for p in (r.box, r.name, r.photos, r.strip))]
        chain = on(digits.click, do.fill, None, filled)
        on(on(chain.success, do.learn, inputs, [learned, estimate]).success, *after)
        page.unload(do.sweep)
    return page


def on(event: Callable[..., Any], do: Callable[..., Any] | None, *args: Any, **options: Any) -> Any:
    """Have an event call a function: one at a time, and a line in the page for bad input."""
    return event(
        _told(do) if do else None,
        *args,
        api_visibility="private",
        concurrency_limit=1,
        concurrency_id="learner",
        **options,
    )


def _told(do: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(do)
    def told(*args: Any) -> Any:
        try:
            return do(*args)
        except UserError as error:
            raise gr.Error(
                escape(str(error)), print_exception=False, title="That cannot be done"
            ) from error

    return told


def _drop(label: str) -> gr.File:
    return gr.File(label=label, file_count="multiple", file_types=["image"], height=130)


def _row(i: int, visible: bool) -> Row:
    with gr.Row(visible=visible, elem_classes="t-class") as box:
        with gr.Column(min_width=180):
            name = gr.Textbox(label=f"Class {i + 1}", max_length=60, max_lines=1)
            clear = gr.Button("Clear", size="sm")
        with gr.Column(scale=2, min_width=240):
            drop, strip = _drop(f"Photos of class {i + 1}"), gr.HTML()
    return Row(box, name, drop, gr.State([]), strip, clear)


class _Handlers:
    """What the events of the page call; each gets and returns values of components."""

    def __init__(self, given: Given, cfg: DictConfig, folder: Path, rows: list[Row]) -> None:
        self.given, self.cfg, self.folder, self.rows = given, cfg, folder, rows
        self.shape = sources.image_shape(given.cfg.data)

    def sweep(self) -> None:
        uploads.sweep(self.folder, STALE)

    def read(self, paths: list[str] | None, room: int) -> Photos:
        images, lines = uploads.read_uploads(paths or [], self.shape, room)
        self.sweep()
        if lines:
            gr.Warning(escape(uploads.first(lines)), duration=30, title="Left out")
        return images

    def add(self, paths: list[str] | None, have: Photos) -> tuple[Any, ...]:
        photos = have + self.read(paths, self.cfg.max_photos - len(have))
        return None, photos, trial.photos_html(photos), None, "", ""

    def learn(self, values: dict[Any, Any], progress: gr.Progress = _PROGRESS) -> tuple[Any, str]:
        names = [values[row.name] or "" for row in self.rows]
        photos = [values[row.photos] for row in self.rows]
        total = sum(map(len, photos))

        def done(n: int) -> None:
            progress((n, total), unit="photos")

        try:
            found = trial.learn(self.given, names, photos, self.cfg.reject, done)
        except UserError as error:
            return None, trial.problem_html(error)
        return found, trial.estimate_html(found)

    def ask(self, paths: list[str] | None, learned: Learned | None) -> tuple[None, Photos, str]:
        photos = self.read(paths, self.cfg.max_photos)
        return None, photos, self.answers(learned, photos)

    def answers(self, learned: Learned | None, queries: Photos) -> str:
        return trial.answers_html(learned, queries)

    def show(self, count: int) -> list[Any]:
        now = min(count + 1, len(self.rows))
        boxes = [gr.Row(visible=i < now) for i in range(len(self.rows))]
        return [now, gr.Button(interactive=now < len(self.rows)), *boxes]

    def fill(self) -> list[Any]:
        ways = self.given.learner.n_way or 5
        names, photos, queries = trial.example(self.given, min(ways, len(self.rows)))
        updates: list[Any] = [list(queries), len(names)]
        for i in range(len(self.rows)):
            mine, name = (list(photos[i]), names[i]) if i < len(names) else ([], "")
            updates += [gr.Row(visible=bool(mine)), name, mine, trial.photos_html(mine)]
        return updates
