"""Files from the network, fetched only where the user's data lacks them: checked by sha256 before they get their name.

A download that breaks goes on where it stopped, in the same run and in the next one. huggingface_hub's `http_get` can resume
too, but neither names the version that it resumes (If-Range) nor is it part of its public API.
"""

import http.client
import logging
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from usdm_sft.utils.cache import sha256_file
from usdm_sft.utils.progress import progress_bar

logger = logging.getLogger(__name__)

TRIES = 5  # in a row that bring nothing new
FIRST_WAIT = 1  # seconds after the first of them, doubled after each one that follows
_TIMEOUT = 60  # seconds without a byte
_CHUNK = 1 << 20  # bytes
_BUSY = (408, 425, 429, 500, 502, 503, 504)  # status codes of a server that may answer later


def download(url: str, path: str | Path, *, sha256: str | None = None) -> str:
    """Download `url` to `path` with a progress bar; `path` appears only when the file is whole and its digest is right.

    What has arrived is kept in `<path>.unfinished`, and its URL and ETag beside it, so that the next try, or the next run,
    asks for the rest of the same version. A server that gives no strong ETag, or has another version by now, sends the whole
    file again. The caller keeps other processes from the same path.

    Returns:
        The sha256 of the file, in hex.

    Raises:
        OSError: Offline mode (HF_HUB_OFFLINE), the server refuses, or `TRIES` tries in a row brought nothing new.
        ValueError: The digest is not `sha256`. Nothing is kept then, so that the next run starts from nothing.
    """
    from huggingface_hub import constants

    path = Path(path)
    if constants.HF_HUB_OFFLINE:
        raise OSError(f"offline mode (HF_HUB_OFFLINE) forbids fetching {url}: put the file at {path} by hand")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _Part(url, path)
    try:
        _fetch_in_tries(part)
    except (OSError, _Broken) as error:
        again = "try again"
        if held := part.size():
            again += f" (the {held:,} bytes that are here are kept)"
        else:
            part.discard()
        raise OSError(f"could not fetch {url} ({error}): {again}, or put the file at {path} by hand") from error
    digest = sha256_file(part.file)
    if sha256 is not None and digest != sha256:
        part.discard()
        raise ValueError(f"{url} has sha256 {digest}, not {sha256}: it is not the file that is known; not kept")
    os.replace(part.file, path)
    part.discard()
    return digest


class _Broken(Exception):
    """What another try may mend: the connection broke, or the server is busy."""


class _Part:
    """The part of a file that has arrived, and the version of the file that it is a part of."""

    def __init__(self, url: str, path: Path):
        self.url = url
        self.path = path
        self.file = path.with_name(f"{path.name}.unfinished")
        self._version = path.with_name(f"{path.name}.unfinished.etag")

    def etag(self) -> str | None:
        """The strong ETag of the version, or None: without one nobody can tell whether the rest belongs to it."""
        # A crash may have left half of it. Half an ETag is the ETag of no version, and the server sends the whole file.
        url, _, etag = self._version.read_text("latin-1").partition("\n") if self._version.is_file() else ("", "", "")
        return etag if url == self.url and etag.isprintable() and etag.startswith('"') else None

    def size(self) -> int:
        """Number of bytes that can be resumed from."""
        return self.file.stat().st_size if self.file.is_file() and self.etag() else 0

    def start(self, etag: str | None) -> None:
        """Begin anew, with nothing, on a version of the file."""
        self.discard()
        if etag is not None and etag.startswith('"'):
            self._version.write_text(f"{self.url}\n{etag}", "latin-1")

    def discard(self) -> None:
        self.file.unlink(missing_ok=True)
        self._version.unlink(missing_ok=True)


def _fetch_in_tries(part: _Part) -> None:
    """Bring a file to its end, however often the connection breaks, as long as every few tries bring something new."""
    most, failures = part.size(), 0
    while True:
        try:
            _fetch(part)
            return
        except _Broken as error:
            held = part.size()
            failures = 1 if held > most else failures + 1
            most = max(held, most)
            if failures == TRIES:
                raise
            wait = FIRST_WAIT * 2 ** (failures - 1)
            logger.warning("%s: %s; going on from byte %s in %s s", part.url, error, f"{held:,}", wait)
            time.sleep(wait)


def _fetch(part: _Part) -> None:
    """One try: the rest of the file, or all of it where the rest is not to be had."""
    # The last byte is asked for again: of a file that is whole already there would be no rest to ask for.
    begin, etag = max(part.size() - 1, 0), part.etag()
    headers = {"Range": f"bytes={begin}-", "If-Range": etag} if begin else {}
    with _network():
        try:
            response = urllib.request.urlopen(urllib.request.Request(part.url, headers=headers), timeout=_TIMEOUT)
        except urllib.error.HTTPError as error:
            if error.code == 416:  # there are fewer bytes than are here
                part.discard()
                raise _Broken("what is here is longer than the file") from error
            raise
    with response:
        if response.status != 206:
            begin = 0
            part.start(response.headers.get("ETag"))
        elif not _is_rest(response, begin, etag):
            part.discard()
            raise _Broken("the server sent something other than the rest of the file")
        total = None if response.length is None else begin + response.length
        with (
            open(part.file, "r+b" if begin else "wb") as file,
            progress_bar(total, part.path.name, "B", initial=begin, unit_scale=True) as bar,
        ):
            file.seek(begin)
            while chunk := _read(response):
                file.write(chunk)
                bar.update(len(chunk))
            if total is not None and file.tell() != total:
                raise _Broken(f"the connection broke after {file.tell():,} of {total:,} bytes")
            file.flush()
            os.fsync(file.fileno())


def _is_rest(response: http.client.HTTPResponse, begin: int, etag: str | None) -> bool:
    """Whether an answer with status 206 is what was asked for: the server may not know If-Range, or miscount."""
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("Content-Range", ""))
    if found is None or response.headers.get("ETag") != etag:
        return False
    first, last, size = map(int, found.groups())
    return first == begin and last == size - 1


def _read(response: http.client.HTTPResponse) -> bytes:
    with _network():
        return response.read(_CHUNK)


@contextmanager
def _network() -> Iterator[None]:
    """Tell errors that another try may mend from those of the disk, and from what the server means."""
    try:
        yield
    except urllib.error.HTTPError as error:
        if error.code not in _BUSY:
            raise
        raise _Broken(str(error)) from error
    except (OSError, http.client.HTTPException) as error:
        raise _Broken(str(error) or type(error).__name__) from error
