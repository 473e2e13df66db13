"""Show all rows of a dataset folder on the page of examples, which reads its Parquet files itself: on this machine, or in a static Space.

`serve` answers on the loopback interface only, to requests that name it as their host, and with a fixed list of files: the pages, their
scripts, and the Parquet files, the card and the counts of the folder. `write_space` writes the same pages as files.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import numpy as np
import pyarrow.parquet as pq
from huggingface_hub import constants

from usdm_sft import __version__
from usdm_sft.audio.reading import AudioError
from usdm_sft.corpus.examples import example_id
from usdm_sft.corpus.manifest import UTTERANCES
from usdm_sft.folder.layout import COUNTS, data_files, read_counts, read_layout
from usdm_sft.folder.page import ASSETS, CorpusRecordings, describe_split, render, spell_ids
from usdm_sft.folder.rows import reading_errors
from usdm_sft.template.chat import lay_out_messages
from usdm_sft.template.parts import ROW_PARTS, RowLayout, list_parts
from usdm_sft.template.tokenizer import load_tokenizer
from usdm_sft.utils.files import replace_text
from usdm_sft.utils.hub import check_repository

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
PORT = 8765
_READER = "hyparquet/src"
_INDEX, _README = "index.html", "README.md"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".md": "text/plain; charset=utf-8",
}
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_BLOCK = 1 << 20  # bytes that are read from a file at once


def make_pages(folder: Path, split: str, *, base: str = "", corpus: bool = False) -> dict[str, str]:
    """Return the HTML of the page of each split, by its name.

    Args:
        folder: A dataset folder.
        split: The split of index.html.
        base: Address of the files of the folder, with a slash at its end; "" if they are beside the page.
        corpus: Whether `FolderServer` gives the recordings of the corpus.

    Raises:
        FileNotFoundError: The folder, or one of its files, is missing.
        ValueError: The folder has no such split, or a file is damaged.
    """
    counts = read_counts(folder)
    if split not in counts["splits"]:
        raise ValueError(f"{folder} has no split {split!r}: name one of {', '.join(counts['splits'])}")
    layout, tokenizer = read_layout(folder / COUNTS, counts), load_tokenizer(folder / "tokenizer").backend_tokenizer
    ids = np.arange(tokenizer.get_vocab_size())
    pieces = spell_ids(ids[~layout.is_unit(ids)].tolist(), tokenizer)
    files = data_files(folder, counts)
    recordings = data_files(folder, counts, UTTERANCES) if UTTERANCES in counts and not corpus else {}
    names = {each: _INDEX if each == split else f"split-{each}.html" for each in counts["splits"]}
    # The Hub redirects to the machines that store files.
    hosts = [base.partition("/datasets/")[0], "https://*.huggingface.co", "https://*.hf.co"] if base else ["'self'"]
    pages = {}
    for each, name in names.items():
        where = {
            "base": base,
            "files": _list_files(folder, files[each]),
            "recordings": _list_files(folder, recordings.get(each, [])),
            "corpus": each if corpus else None,
            "history": counts["settings"]["history"],
            "layout": _describe_layout(layout),
        }
        data = describe_split(counts, each, layout)
        data |= {"examples": [], "recordings": [], "pieces": pieces, "folder": where}
        links = [(f"split {other}", quote(names[other])) for other in names if other != each]
        links += [("dataset card", base + _README), ("counts", base + COUNTS)]
        pages[name] = render(data, each, counts, links, hosts, [name for name in _scripts() if name.endswith(".js")])
    return pages


def _list_files(folder: Path, paths: list[Path]) -> list[tuple[str, int, int]]:
    """Return the name in the folder, the size and the number of the first row of each file."""
    files, start = [], 0
    for path in paths:
        with reading_errors(path, "is not a Parquet file"):
            files.append((path.relative_to(folder).as_posix(), path.stat().st_size, start))
            start += pq.read_metadata(path).num_rows
    return files


def _describe_layout(layout: RowLayout) -> dict[str, Any]:
    """Return what tells the parts of a row apart, for folder.js: the same as `find_parts` uses."""
    tokens, template, chat = layout
    described: dict[str, Any] = {
        "names": list(ROW_PARTS),
        "ends": [tokens.newline, tokens.correspond],
        "instruction": template.instruction.count("\n"),
        "exchange": list_parts(template),
        "newline_after_speech": tokens.newline if len(tokens.end_of_units) > 1 else None,
    }
    if chat is not None:
        places = [lay_out_messages(chat, tokens, template, place) for place in range(len(chat.frames.before_user))]
        described["chat"] = {
            "stop_id": chat.stop_id,
            "stops": [
                sum(frame.count(chat.stop_id) for frame in chat.frames.around(number)) + number for number in (1, 2)
            ],
            "places": [
                [(part or "frame", None if ids is None else ids.tolist()) for part, ids in pieces] for pieces in places
            ],
        }
    return described


def _scripts() -> dict[str, Traversable]:
    """The scripts that the pages load, by their address, with the licence of those that others wrote."""
    reader = ASSETS / "hyparquet"
    found = {f"{_READER}/{file.name}": file for file in (reader / "src").iterdir() if file.name.endswith(".js")}
    return {"folder.js": ASSETS / "folder.js", "hyparquet/LICENSE": reader / "LICENSE", **found}


class FolderServer(ThreadingHTTPServer):
    """Serves a dataset folder on loopback until it is shut down.

    Args:
        folder: A dataset folder.
        split: The split of the first page.
        data_dir: The corpus that the folder was made from; the pages then play its recordings.
        port: Port of 127.0.0.1; 0 takes a free one.

    Raises:
        FileNotFoundError: The folder, one of its files, or a list of the corpus is missing.
        ValueError: The folder has no such split, a file is damaged, or a file of the folder is a link out of it.
        OSError: The port is in use.
    """

    daemon_threads = True

    def __init__(self, folder: str | Path, split: str, *, data_dir: str | Path | None = None, port: int = PORT):
        folder = Path(folder).expanduser()
        counts = read_counts(folder)
        pages = make_pages(folder, split, corpus=data_dir is not None)
        contents = {name: page.encode() for name, page in pages.items()}
        contents |= {name: file.read_bytes() for name, file in _scripts().items()}
        configs = (counts["config"], *([UTTERANCES] if UTTERANCES in counts else []))
        listed = [path for config in configs for paths in data_files(folder, counts, config).values() for path in paths]
        paths = [*listed, folder / _README, folder / COUNTS]
        for path in paths:
            _refuse_link(path, folder.resolve())
        files = {path.relative_to(folder).as_posix(): path for path in paths}
        self.contents: dict[str, bytes | Path] = {**files, **contents}
        self.recordings = {}
        if data_dir is not None:
            self.recordings = {each: CorpusRecordings(data_dir, each, counts) for each in counts["splits"]}
        try:
            super().__init__((LOOPBACK, port), _Handler)
        except (OSError, OverflowError) as error:
            raise OSError(
                f"port {port} of {LOOPBACK} cannot be used ({error}): name another one with --port"
            ) from error
        self.hosts = {f"{name}:{self.server_port}" for name in (LOOPBACK, "localhost")}
        self.url = f"http://{LOOPBACK}:{self.server_port}/"

    def handle_error(self, *args: Any) -> None:
        """Say in one line what went wrong with a request; a page that was closed says nothing."""
        if not isinstance(error := sys.exception(), ConnectionError):
            logger.warning("a request of the page failed: %s", error)


def _refuse_link(path: Path, folder: Path) -> None:
    """Refuse a file whose content is outside the folder. In the Hub's cache, the files of a folder are links to `blobs`.

    Raises:
        ValueError: The file is a link out of the folder.
    """
    blobs = folder.parents[1] / "blobs" if folder.parent.name == "snapshots" else folder
    if not any(path.resolve().is_relative_to(root) for root in (folder, blobs)):
        raise ValueError(f"{path} is a link out of the folder, and only files of the folder are served: remove it")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # a browser asks for many ranges on few connections
    server_version, sys_version = "dailytalk-usdm", ""
    disable_nagle_algorithm, wbufsize = True, -1  # headers and body in one packet, without a wait for the one before
    timeout = 60
    server: FolderServer

    def do_GET(self) -> None:
        """Answer with a file, a range of it, or the recordings of a row."""
        # A site whose name was made to point to this machine sends its own name as the host.
        if self.headers.get("Host") not in self.server.hosts:
            return self._send(HTTPStatus.FORBIDDEN, b"This server answers to 127.0.0.1 and localhost only.\n")
        address = urlsplit(self.path)
        name = unquote(address.path).removeprefix("/") or _INDEX
        if name == "recordings":
            return self._send_recordings(parse_qs(address.query))
        content = self.server.contents.get(name)
        if content is None:
            return self._send(HTTPStatus.NOT_FOUND, b"There is no such file.\n")
        kind = _TYPES.get(Path(name).suffix, "application/octet-stream")
        if isinstance(content, bytes):
            return self._send(HTTPStatus.OK, content, kind)
        try:
            return self._send_file(content, kind)
        except FileNotFoundError:
            logger.warning("%s is gone: put it back, or start again with another folder", content)
            return self._send(HTTPStatus.NOT_FOUND, b"The file is gone.\n")

    def _send_file(self, path: Path, kind: str) -> None:
        with path.open("rb") as file:
            size = path.stat().st_size
            found = _RANGE.fullmatch(self.headers.get("Range", "").strip())  # several ranges get the whole file
            start, stop, status = 0, size, HTTPStatus.OK
            if found is not None and any(found.groups()):
                first, last = found.groups()
                start = int(first) if first else max(0, size - int(last))
                stop = min(size, int(last) + 1) if first and last else size
                status = HTTPStatus.PARTIAL_CONTENT
                if start >= stop:
                    headers = {"Content-Range": f"bytes */{size}"}
                    return self._send(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, headers=headers)
            headers = {"Content-Length": str(stop - start), "Accept-Ranges": "bytes"}
            if status == HTTPStatus.PARTIAL_CONTENT:
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
            self._send(status, None, kind, headers)
            file.seek(start)
            while start < stop and (block := file.read(min(_BLOCK, stop - start))):
                self.wfile.write(block)
                start += len(block)

    def _send_recordings(self, query: Mapping[str, list[str]]) -> None:
        """Send the recordings of the turns of a row as JSON, null for a turn without one. The corpus names the files."""
        try:
            split, dialog_id, turn, num_turns = (query[name][0] for name in ("split", "dialog", "turn", "turns"))
            corpus = self.server.recordings[split]
            row = {"id": example_id(dialog_id, int(turn)), "dialog_id": dialog_id, "turn": int(turn)}
            recordings = [corpus.encode(address) if address else None for address in corpus.find(row, int(num_turns))]
        except (LookupError, ValueError, OSError, AudioError) as error:
            return self._send(HTTPStatus.NOT_FOUND, f"{error}\n".encode())
        return self._send(HTTPStatus.OK, json.dumps(recordings).encode(), _TYPES[".json"])

    def _send(
        self,
        status: HTTPStatus,
        body: bytes | None = b"",
        kind: str = "text/plain; charset=utf-8",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.send_response(status)
        common = {"Content-Type": kind, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
        common["Cross-Origin-Resource-Policy"] = "same-origin"
        if body is not None:
            common["Content-Length"] = str(len(body))
        for name, value in {**common, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if body is not None:
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: a page asks for hundreds of ranges."""


def write_space(folder: str | Path, output: str | Path, repo_id: str, split: str) -> None:
    """Write the files of a static Space that shows the rows of a pushed dataset.

    Args:
        folder: The dataset folder that was pushed.
        output: A folder for the files, which replace those of the same names.
        repo_id: The dataset repository, such as "user/name", which must be public.
        split: The split of the first page.

    Raises:
        FileExistsError: `output` has a README.md that is not of a static Space, such as the dataset folder itself.
        FileNotFoundError: The folder, or one of its files, is missing.
        ValueError: The folder has no such split, a file is damaged, or the name of the repository is wrong.
    """
    check_repository(repo_id)
    folder, output = Path(folder).expanduser(), Path(output).expanduser()
    readme = output / _README
    if readme.exists() and "sdk: static" not in readme.read_text(encoding="utf-8", errors="replace"):
        raise FileExistsError(f"{readme} is not that of a static Space: name another folder")
    pages = make_pages(folder, split, base=f"{constants.ENDPOINT}/datasets/{repo_id}/resolve/main/")
    title = repo_id.rpartition("/")[2]
    card = f"---\ntitle: {json.dumps(title)}\nsdk: static\ndatasets:\n- {repo_id}\n---\n\nThe rows of the dataset {repo_id}, "
    card += f"written by dailytalk-usdm {__version__}.\n"
    texts = {name: file.read_text(encoding="utf-8") for name, file in _scripts().items()}
    for name, text in {**texts, **pages, _README: card}.items():
        replace_text(output / name, text)
