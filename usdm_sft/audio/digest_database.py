"""Digests of files, remembered in an SQLite file of the cache."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger(__name__)

TABLE = "files_6"  # gets another name when its columns or the checks of audio change
SETTLED_NS = 2_000_000_000  # a file that changed more recently could change again with the same time stamp


Stamp = tuple[int, int, int]  # size and times of change of files; any later change increases the last one


class Row(NamedTuple):
    """A digest, and the size and times of change of the file that it was made from."""

    path: str
    size: int
    mtime_ns: int
    ctime_ns: int
    sha256: str
    frames: int  # 0 if the file was not checked as audio
    rate: int
    channels: int  # 0 if the file was not checked as audio

    @property
    def stamp(self) -> Stamp:
        """Size and times of change."""
        return self[1:4]

    def is_settled(self, started_ns: int) -> bool:
        """Return True if the row may be remembered; reading began at `started_ns`. Zeros stand for a file that did not exist."""
        return 0 < max(self.mtime_ns, self.ctime_ns) < started_ns - SETTLED_NS


class DigestDatabase:
    """The remembered rows. They only save time: after an error, which is logged, the run goes on without them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._database: sqlite3.Connection | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_symlink():  # SQLite would write into the file that it points to
                path.unlink()
            self._database = sqlite3.connect(path, timeout=60)
            self._database.execute(
                f"CREATE TABLE IF NOT EXISTS {TABLE} (path TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER,"
                " ctime_ns INTEGER, sha256 TEXT, frames INTEGER, rate INTEGER, channels INTEGER)"
            )
        except (sqlite3.Error, OSError) as error:
            self._give_up(error)

    def read(self, paths: Sequence[str]) -> dict[str, Row]:
        """Return the remembered rows of some paths; SQLite takes 32,766 at once."""
        if self._database is None:
            return {}
        query = f"SELECT * FROM {TABLE} WHERE path IN ({','.join('?' * len(paths))})"
        try:
            return {row[0]: Row(*row) for row in self._database.execute(query, paths)}
        except sqlite3.Error as error:
            self._give_up(error)
            return {}

    def write(self, rows: Sequence[Row]) -> None:
        """Remember some rows."""
        if self._database is None or not rows:
            return
        try:
            with self._database:
                self._database.executemany(f"INSERT OR REPLACE INTO {TABLE} VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)
        except sqlite3.Error as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        logger.warning("digests are not remembered this time: %s (%s)", self._path, error)
        self.close()
        self._database = None
        if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError):
            self._path.unlink(missing_ok=True)  # damaged: the next run makes it again

    def close(self) -> None:
        """Close the file."""
        if self._database:
            self._database.close()
