"""What `adapt` leaves behind: files, tables, pictures, numbers. Floor 4."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.adapted_pictures import Labelled, pictures
from pipeline.calibration import wilson_interval
from pipeline.classifier import Estimate, PhotoClassifier, Predictions
from pipeline.contact_sheet import Shown, contact_sheet
from pipeline.data.photos import Photos
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.tracking.run import Run

FILES = ("predictions.csv", "predictions.html", "classifier.onnx", "classifier.pt2")
"""What an earlier call may have left that this one does not write."""
LINES = 12  # predictions, and photos left out, that are printed; the files have all


class Adapted:
    """A classifier, the photos it was made from, and what it says of others.

    Args:
        classifier: calibrated.
        support: its photos.
        estimate: of its accuracy.
        query, said: photos and what it says of them; None if there are none.
    """

    def __init__(
        self,
        classifier: PhotoClassifier,
        support: Photos,
        estimate: Estimate,
        query: Photos | None,
        said: Predictions | None,
    ) -> None:
        self.classifier, self.support, self.estimate = classifier, support, estimate
        self.query, self.said = query, said
        self.names = classifier.class_names

    @property
    def truth(self) -> np.ndarray | None:
        """(q,) classes of the queries, if they are known."""
        return None if self.query is None else self.query.labels

    def numbers(self) -> dict[str, float]:
        """What is known of the accuracy, in 0..1."""
        found = {"accuracy": self.estimate.accuracy}
        if self.said is not None and self.truth is not None:
            found["query_accuracy"] = float((self.said.labels == self.truth).mean())
        return found

    def about(self) -> list[str]:
        """Lines on the classifier: what it is, how good, what it cannot do."""
        made, estimate = self.classifier.provenance, self.estimate
        network = f" ({made['backbone']})" if made["backbone"] else ""
        lines = [
            f"{len(self.names)} classes, {len(self.support.paths)} photos, by {made['learner']}"
            f"{network}, {made['protocol']}"
        ]
        if made["protocol"] == "transductive":
            lines.append("transductive: what is said of a photo depends on those beside it")
        if estimate.photos:
            low, high = (100 * bound for bound in estimate.interval)
            more = "; with all of them it should be a little higher" * (estimate.accuracy < 1)
            lines.append(
                f"expected accuracy {100 * estimate.accuracy:.0f} % ({low:.0f} to {high:.0f} %): "
                f"{estimate.correct.sum()} of {estimate.photos} photos were right when left out in "
                f"turn{more}"
            )
            counts = np.bincount(self.labels, minlength=len(self.names))
            if alone := [n for n, k in zip(self.names, counts, strict=True) if k == 1]:
                few = ", ".join(alone[:LINES]) + ", ..." * (len(alone) > LINES)
                lines.append(f"unknown for classes of one photo, which cannot be left out: {few}")
        else:
            lines.append("expected accuracy unknown: no class has two photos, to leave one out")
        lines += self._copies()
        if not self.classifier.can_reject:
            needed = self.classifier.needed_to_reject
            why = f"needs {needed} photos left out, found {estimate.photos}" if needed else "is off"
            lines.append(f"no photo is said to look like none of the classes: reject {why}")
        return lines

    def _copies(self) -> list[str]:
        """Lines on equal photos, which make accuracies look better than they are."""
        given = [photo.tobytes() for photo in self.support.images]
        lines = []
        if copies := len(given) - len(set(given)):
            lines.append(f"{copies} of its photos are copies of others: the estimate is too high")
        if self.query is not None:
            known = set(given)
            if seen := sum(photo.tobytes() in known for photo in self.query.images):
                lines.append(f"{seen} of the photos to classify are among those it was made from")
        return lines

    def predictions(self) -> pd.DataFrame:
        """A row a query, as they came: what is said of it, and the probability of each class."""
        assert self.query is not None
        assert self.said is not None
        frame = pd.DataFrame({"path": self.query.paths})
        frame["class"] = [self.names[i] for i in self.said.labels]
        frame["confidence"] = self.said.confidences
        frame["p_known"], frame["looks_like_none"] = self.said.known, self.said.rejected
        if self.truth is not None:
            frame["true"] = [self.names[i] for i in self.truth]
        each = pd.DataFrame(self.said.probabilities, columns=[f"p({n})" for n in self.names])
        return pd.concat([frame, each], axis=1).round(6)

    def held_out(self) -> pd.DataFrame:
        """A row a support photo that was left out: path, true class, and what it was taken for."""
        photos = self.estimate
        rows = {
            "path": [self.support.paths[i] for i in photos.indices],
            "true": [self.names[self.labels[i]] for i in photos.indices],
            "class": [self.names[i] for i in photos.predicted],
            "right": photos.correct,
        }
        return pd.DataFrame(rows)

    def write(self, out: Path) -> list[Path]:
        """All files, in place of earlier ones in the folder; returns the tables and the page."""
        for name in FILES:
            (out / name).unlink(missing_ok=True)
        self.classifier.save(out / "classifier.pt")
        self.held_out().to_csv(held_out := out / "held_out.csv", index=False)
        if self.query is None or self.said is None:
            return [held_out]
        frame = self.predictions()
        frame.to_csv(predictions := out / "predictions.csv", index=False)
        rows = [
            Shown(row.path, image, row[1], row.confidence, row.looks_like_none, true)
            for row, image, true in zip(
                frame.itertuples(index=False),
                self.query.images,
                frame["true"] if "true" in frame else [None] * len(frame),
                strict=True,
            )
        ]
        page = contact_sheet(rows, "What the photos show", self.about(), self.support)
        (sheet := out / "predictions.html").write_text(page, encoding="utf-8")
        return [held_out, predictions, sheet]

    def export(self, out: Path, forms: Sequence[str]) -> None:
        """Files that run without this package; one that cannot be made gets a line."""
        from pipeline.onnx_export import export_onnx, export_program

        for form in forms:
            write = {"onnx": export_onnx, "pt2": export_program}[form]
            path = out / f"classifier.{form}"
            try:
                off = write(self.classifier, path)
                print(f"{path.name}: probabilities differ from the module's by {off:.0e} at most")
            except UserError as error:
                print(f"export: {error}", file=sys.stderr)

    @property
    def labels(self) -> np.ndarray:
        """(m,) classes of the support photos."""
        assert self.support.labels is not None
        return self.support.labels

    def say(self) -> None:
        """Print what matters: left-out files, the classifier, doubtful photos."""
        for photos in (self.support, self.query):
            bad = photos.bad if photos else []
            for line in bad[:LINES]:
                print(f"not read: {line}")
            if len(bad) > LINES:
                print(f"not read: {len(bad) - LINES} more")
        for line in self.about():
            print(line)
        for row in self.held_out().query("not right").head(LINES).to_dict("records"):
            print(f"  left out, {row['path']} was taken for {row['class']}; is its label right?")
        if self.said is None:
            return
        frame = self.predictions()
        frame["path"] = _shortened(frame["path"])
        frame = frame.sort_values(["looks_like_none", "confidence"], ascending=[False, True])
        table = Table(title=f"{len(frame)} photos, the doubtful ones first", title_justify="left")
        columns = [
            c for c in ("path", "class", "confidence", "looks_like_none", "true") if c in frame
        ]
        for column in columns:
            table.add_column(column.replace("_", " "), overflow="fold")
        for row in frame.head(LINES)[columns].to_dict("records"):
            none = "yes" if row["looks_like_none"] else ""
            shown = row | {
                "confidence": f"{100 * row['confidence']:.0f} %",
                "looks_like_none": none,
            }
            table.add_row(*(Text(str(shown[c])) for c in columns))  # names are no markup
        Console(width=None if sys.stdout.isatty() else 110).print(table)
        if len(frame) > LINES:
            print(f"and {len(frame) - LINES} more, see predictions.csv and predictions.html")
        if self.truth is not None:
            right = int((self.said.labels == self.truth).sum())
            low, high = (100 * b for b in wilson_interval(right, len(frame)))
            share = 100 * right / len(frame)
            print(f"right: {right} of {len(frame)}, {share:.1f} % ({low:.0f} to {high:.0f} %)")

    def track(self, run: "Run", files: Sequence[Path]) -> None:
        """Numbers, the files that `write` returned, and pictures, to a run."""
        low, high = self.estimate.interval
        numbers = {f"held_out/{k}": v for k, v in (("ci95_low", low), ("ci95_high", high))}
        numbers["held_out/acc"] = self.estimate.accuracy
        if "query_accuracy" in (own := self.numbers()):
            numbers["query/acc"] = own["query_accuracy"]
        numbers["temperature"] = self.classifier.temperature
        run.log_metrics({k: v for k, v in numbers.items() if not np.isnan(v)}, 0)
        for path in files:
            run.log_file(path, "predictions")
        labelled = None
        if self.query is not None and self.said is not None and self.truth is not None:
            labelled = Labelled(self.query.images, self.truth, self.said)
        drawn = pictures(self.classifier, self.labels, labelled, self.about()[0])
        for name, figure in drawn:
            run.log_figure(figure, f"figures/{name}.png")


def _shortened(paths: Sequence[str]) -> list[str]:
    """Without the folders that all have in common."""
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [os.path.relpath(path, common or ".") for path in paths]
