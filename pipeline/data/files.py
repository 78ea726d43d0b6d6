"""Image files of a folder tree or of zip files: listed and read, not decoded. Floor 1."""

import hashlib
import json
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from pipeline.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MAX_BYTES = 64 * 2**20  # of one image file


@dataclass(frozen=True, slots=True)
class Entry:
    """An image file, not opened yet.

    Attributes:
        member: path below `container`, with "/".
        size: bytes.
        stamp: modification time in ns, or the CRC-32 if it lies in a zip.
        container: the folder or the zip that was scanned.
        zipped: whether `container` is a zip.
    """

    member: str
    size: int
    stamp: int
    container: Path
    zipped: bool

    @property
    def parts(self) -> tuple[str, ...]:
        """Folder names and file name below `container`."""
        return tuple(part for part in self.member.split("/") if part not in ("", "."))

    @property
    def suffix(self) -> str:
        """Of the file, in small letters, with its dot."""
        return Path(self.member).suffix.lower()

    def __str__(self) -> str:
        return f"{self.container}/{self.member}"


Read = Callable[[Entry], bytes]


def check_bytes(count: int) -> None:
    """Refuse a file that is larger than an image has a reason to be.

    Raises:
        ValueError: above `MAX_BYTES`.
    """
    if count > MAX_BYTES:
        raise ValueError(f"{count:,} bytes, more than the {MAX_BYTES:,} (64 MiB) that are read")


def scan(root: Path) -> list[Entry]:
    """List the images of a zip, or of a folder tree and the zips that lie in its first level.

    Hidden files and folders, and files without one of `SUFFIXES`, are left out.

    Returns:
        Entries in the order of their paths; zips come first.

    Raises:
        UserError: if a folder cannot be read or a zip is damaged.
    """
    if root.is_file():
        return _scan_zip(root)
    try:
        zips = sorted(p for p in root.iterdir() if p.suffix.lower() == ".zip" and p.is_file())
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error
    visible = [path for path in zips if not path.name.startswith(".")]
    loose = [entry for entry in tree(root) if entry.suffix in SUFFIXES]
    return [entry for path in visible for entry in _scan_zip(path)] + loose


def tree(root: Path) -> list[Entry]:
    """List the visible files of a folder tree, whatever they hold, in the order of their paths.

    Raises:
        UserError: if a folder cannot be read.
    """
    try:
        return sorted(_walk(root, root, frozenset()), key=lambda entry: entry.parts)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error


def _walk(folder: Path, root: Path, above: frozenset[str]) -> Iterator[Entry]:
    real = os.path.realpath(folder)
    if real in above:  # a link to a folder that holds it
        return
    with os.scandir(folder) as items:
        for item in items:
            if item.name.startswith("."):
                continue
            path = Path(item.path)
            if item.is_dir():
                yield from _walk(path, root, above | {real})
            else:
                try:
                    found = item.stat()
                except FileNotFoundError:  # a link to nowhere: unreadable once it is decoded
                    found = item.stat(follow_symlinks=False)
                member = path.relative_to(root).as_posix()
                yield Entry(member, found.st_size, found.st_mtime_ns, root, False)


def _scan_zip(file: Path) -> list[Entry]:
    with _open_zip(file) as archive:
        entries = [
            Entry(info.filename, info.file_size, info.CRC, file, True)
            for info in archive.infolist()
            if not info.is_dir() and info.filename.lower().endswith(SUFFIXES)
        ]
    return sorted((e for e in entries if not _hidden(e)), key=lambda entry: entry.parts)


def _hidden(entry: Entry) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in entry.parts)


def _open_zip(file: Path) -> ZipFile:
    try:
        return ZipFile(file)
    except (BadZipFile, OSError) as error:
        raise UserError(
            f"{file}: not a readable zip ({error}); delete it and get it again"
        ) from error


@contextmanager
def reader(entries: Iterable[Entry]) -> Iterator[Read]:
    """Give a thread-safe function that reads an entry; each zip is opened once.

    It raises ValueError for what is no file, or one above `MAX_BYTES`.
    """
    with ExitStack() as stack:
        zips = {e.container for e in entries if e.zipped}
        archives = {file: stack.enter_context(_open_zip(file)) for file in zips}
        lock = threading.Lock()

        def read(entry: Entry) -> bytes:
            check_bytes(entry.size)
            if not entry.zipped:
                return _read_file(entry.container / entry.member)
            with lock:
                return archives[entry.container].read(entry.member)

        yield read


def _read_file(path: Path) -> bytes:
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for, a device has no end
        raise ValueError("not a regular file")
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)  # it may have grown
    check_bytes(len(data))
    return data


def digest(entries: Iterable[Entry]) -> str:
    """SHA-256 (hex) of paths, sizes and times or CRCs: changes when a file does.

    A CRC speaks for the content wherever the zip lies; a time only for the file at that place.
    """
    rows = [
        (None if e.zipped else str(e.container.resolve()), e.member, e.size, e.stamp)
        for e in entries
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
