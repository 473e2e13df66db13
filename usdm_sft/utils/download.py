"""Downloads that resume after a break and are checked by sha256 before the file gets its name.

huggingface_hub's `http_get` can resume too, but it does not name the version that it resumes (If-Range), and it is not part of
the public API.
"""

import http.client
import logging
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from huggingface_hub import constants

from usdm_sft.utils.files import SUFFIX, replace_path, sha256_file
from usdm_sft.utils.progress import progress_bar
from usdm_sft.utils.texts import first_line

logger = logging.getLogger(__name__)

TRIES = 5  # failed tries in a row that bring no new byte
FIRST_WAIT = 1  # seconds after the first failed try; doubled after each further one
_TIMEOUT = 60  # seconds without a byte
_CHUNK = 1 << 20  # bytes
_BUSY = (408, 425, 429, 500, 502, 503, 504)  # status codes of a server that may answer later


def download(url: str, path: str | Path, *, sha256: str | None = None) -> str:
    """Download `url` to `path` with a progress bar. `path` appears only when the file is complete and its digest is right.

    The part that has arrived is kept in `<path>.unfinished`, with its URL and ETag in a file beside it. The next try or the
    next run requests the rest of the same version. A server without a strong ETag, or with another version, sends the whole
    file again. The caller makes sure that no other process writes the same path.

    Returns:
        The sha256 of the file, in hex.

    Raises:
        OSError: Offline mode (HF_HUB_OFFLINE) is on, the server refuses, or `TRIES` tries in a row brought no new byte.
        ValueError: The digest is not `sha256`. The file is deleted.
    """
    path = Path(path)
    if constants.HF_HUB_OFFLINE:
        raise OSError(f"offline mode (HF_HUB_OFFLINE) forbids fetching {url}: put the file at {path} by hand")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = PartialFile(url, path)
    try:
        _fetch_in_tries(part)
    except (OSError, _Broken) as error:
        again = "try again"
        if size := part.size():
            again += f" (the {size:,} bytes that have arrived are kept)"
        else:
            part.discard()
        raise OSError(
            f"could not fetch {url} ({first_line(error)}): {again}, or put the file at {path} by hand"
        ) from error
    digest = sha256_file(part.file)
    if sha256 is not None and digest != sha256:
        part.discard()
        raise ValueError(f"{url} has sha256 {digest}, not {sha256}: it is not the known file and was deleted")
    replace_path(part.file, path)
    part.discard()
    return digest


def remote_size(url: str, *, timeout: float) -> int:
    """Ask a server for the size of a file.

    Args:
        url: Address of the file.
        timeout: Seconds without an answer after which the server counts as unreachable.

    Returns:
        The size in bytes, or 0 if the server does not say it.

    Raises:
        OSError: Offline mode (HF_HUB_OFFLINE) is on, or the server does not answer or refuses.
    """
    if constants.HF_HUB_OFFLINE:
        raise OSError(
            f"{url} is needed, and offline mode (HF_HUB_OFFLINE) forbids fetching it: run once without offline mode"
        )
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout) as response:
            return int(response.headers.get("Content-Length") or 0)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise OSError(f"{url} cannot be reached ({first_line(error)}): check the network and the proxy") from error


class _Broken(Exception):
    """A failure that another try may overcome: the connection broke, or the server is busy."""


class PartialFile:
    """The part of a file that has arrived, with the version of the file that it belongs to."""

    def __init__(self, url: str, path: Path):
        self.url = url
        self.path = path
        self.file = path.with_name(path.name + SUFFIX)
        self._version = path.with_name(f"{path.name}{SUFFIX}.etag")

    def etag(self) -> str | None:
        """Return the strong ETag of the version. None means that the rest cannot be matched to this part."""
        # A crash may have cut the record short. Half an ETag matches no version, and the server sends the whole file.
        url, _, etag = self._version.read_text("latin-1").partition("\n") if self._version.is_file() else ("", "", "")
        return etag if url == self.url and etag.isprintable() and etag.startswith('"') else None

    def size(self) -> int:
        """Return the number of bytes that a download can resume from."""
        is_own = self.file.is_file() and not self.file.is_symlink()
        return self.file.stat().st_size if is_own and self.etag() else 0

    def start(self, etag: str | None) -> None:
        """Discard the part and record the version that is about to arrive."""
        self.discard()
        if etag is not None and etag.startswith('"'):
            self._version.write_text(f"{self.url}\n{etag}", "latin-1")

    def discard(self) -> None:
        self.file.unlink(missing_ok=True)
        self._version.unlink(missing_ok=True)


def _fetch_in_tries(part: PartialFile) -> None:
    """Fetch a file in as many tries as it takes, as long as no `TRIES` of them in a row bring no new byte."""
    most, failures = part.size(), 0
    while True:
        try:
            _fetch(part)
            return
        except _Broken as error:
            size = part.size()
            failures = 1 if size > most else failures + 1
            most = max(size, most)
            if failures == TRIES:
                raise
            wait = FIRST_WAIT * 2 ** (failures - 1)
            logger.warning("%s: %s; resuming from byte %s in %s s", part.url, error, f"{size:,}", wait)
            time.sleep(wait)


def _fetch(part: PartialFile) -> None:
    """Make one try: fetch the rest of the file, or all of it where the server does not send the rest."""
    # Request the last byte again: a part that is already complete would have no rest to request.
    begin, etag = max(part.size() - 1, 0), part.etag()
    headers = {"Range": f"bytes={begin}-", "If-Range": etag} if begin and etag else {}
    with _network():
        try:
            response = urllib.request.urlopen(urllib.request.Request(part.url, headers=headers), timeout=_TIMEOUT)
        except urllib.error.HTTPError as error:
            if error.code == 416:  # range not satisfiable
                part.discard()
                raise _Broken("the part on disk is longer than the file") from error
            raise
    with response:
        if response.status != 206:
            begin = 0
            part.start(response.headers.get("ETag"))
        elif not (begin and _is_rest(response, begin, etag)):
            part.discard()
            raise _Broken("the server sent something other than the rest of the file")
        total = None if response.length is None else begin + response.length
        read = _network()(partial(response.read, _CHUNK))
        with (
            open(part.file, "r+b" if begin else "wb") as file,
            progress_bar(total, part.path.name, "B", initial=begin) as bar,
        ):
            file.seek(begin)
            for chunk in iter(read, b""):
                file.write(chunk)
                bar.update(len(chunk))
            if total is not None and file.tell() != total:
                raise _Broken(f"the connection broke after {file.tell():,} of {total:,} bytes")


def _is_rest(response: http.client.HTTPResponse, begin: int, etag: str | None) -> bool:
    """Check that a response with status 206 is the requested range; a server may ignore If-Range or miscount."""
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("Content-Range", ""))
    if found is None or response.headers.get("ETag") != etag:
        return False
    first, last, size = map(int, found.groups())
    return first == begin and last == size - 1


@contextmanager
def _network() -> Iterator[None]:
    """Raise `_Broken` for network errors that another try may overcome; errors of the disk stay outside this block."""
    try:
        yield
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError) and error.code not in _BUSY:
            raise
        raise _Broken(str(error) or type(error).__name__) from error
