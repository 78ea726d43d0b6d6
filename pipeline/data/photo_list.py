"""A CSV that lists a user's photos, with their classes or without. Floor 1."""

import csv
import os
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

from pipeline.data.files import MAX_BYTES, Entry
from pipeline.errors import UserError

LISTS = (".csv", ".tsv", ".txt")
_PATH = ("path", "file", "image", "filename")
_LABEL = ("label", "class")
_DELIMITERS = ",;\t"


class Listed(NamedTuple):
    """Photos that were found, not yet read.

    Attributes:
        entries: the files.
        labels: the class of each; None if not known.
        rows: the line of each in the CSV, from 1; None if there is no CSV.
        left_out: a line for each file that is not among them.
    """

    entries: list[Entry]
    labels: list[str] | None = None
    rows: list[int] | None = None
    left_out: Sequence[str] = ()


def class_name(text: str) -> str:
    """A name as it is compared: macOS writes the accents of file names as separate letters."""
    return unicodedata.normalize("NFC", text.strip())


def can_be_shown(text: str) -> bool:
    """Whether a name is Unicode of one line, so that terminals and pages can show it."""
    return not any(unicodedata.category(sign) in ("Cc", "Cs") for sign in text)


def read_list(file: Path, key: str, labelled: bool, known: Sequence[str] = ()) -> Listed:
    """Read a CSV with a header: a column for the path, relative to the CSV, and one for the class.

    Whether the files are there is found out when they are read.

    Args:
        file: UTF-8, with or without a byte order mark; cells separated by comma, semicolon or tab.
        key: begins the errors.
        labelled: whether the column of the class is needed; then no file may be in two rows.
        known: the classes that are allowed, if not all.

    Raises:
        UserError: naming the row, if a cell is missing or a path leads out of the CSV's folder.
    """
    rows = _rows(file, key)
    _, header = next(rows, (1, []))
    path_at, label_at = _columns(header, key, labelled)
    entries: list[Entry] = []
    labels: list[str] = []
    lines: list[int] = []
    seen: dict[str, int] = {}
    for line, cells in rows:
        where = f"{key}: row {line}"
        if len(cells) != len(header):
            raise UserError(f"{where}: {len(cells)} cells, but {len(header)} in the header")
        text = cells[path_at].strip()
        named = text if label_at is None else text + cells[label_at].strip()
        if not can_be_shown(named):
            raise UserError(f"{where}: {text!a} or its class holds signs that cannot be shown")
        if not text:
            raise UserError(f"{where}: its {header[path_at].strip()} is empty")
        entry, real = _entry(file.parent, text, f"{where}: {text}")
        if seen.setdefault(real, line) != line and labelled:
            raise UserError(f"{where}: {text}: the same file as in row {seen[real]}")
        if label_at is not None:
            label = class_name(cells[label_at])
            if not label:
                raise UserError(f"{where}: {text}: its {header[label_at].strip()} is empty")
            if known and label not in known:
                raise UserError(f"{where}: class {label!r} is none of {', '.join(known)}")
            labels.append(label)
        entries.append(entry)
        lines.append(line)
    if not entries:
        raise UserError(f"{key}: no rows below its header")
    return Listed(entries, None if label_at is None else labels, lines)


def _rows(file: Path, key: str) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not blank, with their line numbers; the header is the first."""
    try:
        if file.stat().st_size > MAX_BYTES:
            raise UserError(f"{key}: above {MAX_BYTES >> 20} MiB, so no list of photos")
        with file.open(encoding="utf-8-sig", newline="") as opened:
            first = opened.readline()
            opened.seek(0)
            # The delimiter that shows the most columns of known names is the one.
            shown = {d: _named(next(csv.reader([first], delimiter=d), [])) for d in _DELIMITERS}
            lines = csv.reader(opened, delimiter=max(shown, key=lambda d: shown[d]), strict=True)
            for cells in lines:
                if any(cell.strip() for cell in cells):
                    yield lines.line_num, cells
    except UnicodeDecodeError as error:
        raise UserError(f"{key}: not UTF-8 text; save it as CSV UTF-8") from error
    except (OSError, csv.Error) as error:
        raise UserError(f"{key}: cannot be read as a CSV ({error})") from error


def _named(header: Sequence[str]) -> int:
    return sum(cell.strip().lower() in _PATH + _LABEL for cell in header)


def _columns(header: Sequence[str], key: str, labelled: bool) -> tuple[int, int | None]:
    """Where the path and the class are."""
    names = [cell.strip().lower() for cell in header]
    paths = [i for i, name in enumerate(names) if name in _PATH]
    labels = [i for i, name in enumerate(names) if name in _LABEL]
    if len(paths) != 1 or len(labels) > 1 or (labelled and not labels):
        wanted = f"one of {', '.join(_PATH)}" + f" and one of {', '.join(_LABEL)}" * labelled
        found = ", ".join(cell.strip() for cell in header)[:200] or "nothing"
        raise UserError(f"{key}: its first row is {found}; expected a header with {wanted}")
    return paths[0], labels[0] if labels else None


def _entry(folder: Path, text: str, where: str) -> tuple[Entry, str]:
    """The file of a row, with its real path.

    Raises:
        UserError: if it lies outside of the folder: a list that someone else wrote must not show
            the files of the one who uses it.
    """
    if "\\" in text and not os.path.exists(folder / text):
        text = text.replace("\\", "/")
    real = Path(os.path.realpath(folder / text))
    absolute = Path(text).is_absolute() or PureWindowsPath(text).is_absolute()
    if absolute or not real.is_relative_to(os.path.realpath(folder)):
        raise UserError(
            f"{where}: outside of the folder of the CSV; expected a path relative to that folder"
        )
    try:
        found = real.stat()
    except OSError:  # told when it is to be read
        return Entry(text, 0, 0, folder, False), str(real)
    return Entry(text, found.st_size, found.st_mtime_ns, folder, False), str(real)
