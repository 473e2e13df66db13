"""Render chat templates in a process of their own, with a bound on time, memory and text.

A chat template is code of an untrusted tokenizer. The sandbox of jinja2 keeps it from the machine, but two nested loops run for hours, and
`'a' * 10**10` is one step that nothing inside the process can stop. So another process renders, which this one can end.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from usdm_sft.utils.forks import renew_after_fork
from usdm_sft.utils.processes import PipedProcess
from usdm_sft.utils.texts import first_line

SECONDS = 10.0  # for one conversation, of which a real template renders thousands in a second
_MEMORY = 1 << 30  # bytes beyond what the process has before it renders
_CHARACTERS, _PER_CHARACTER = 1_000_000, 10  # of the text: those of the template, and for each one of the messages

Message = Mapping[str, str]
Rendered = tuple[str, list[tuple[int, int]]]


class RenderError(Exception):
    """A chat template refuses a conversation, or takes more than it may. The message says why."""


_lock = threading.Lock()
renew_after_fork(sys.modules[__name__], "_lock")
_processes: dict[int, PipedProcess] = {}  # id of this process -> the one that renders for it; a fork starts its own


def render_chat(
    source: str, special_tokens: Mapping[str, str], messages: Sequence[Message], options: Mapping[str, bool]
) -> Rendered:
    """Render a conversation as `apply_chat_template` does.

    Args:
        source: The chat template.
        special_tokens: The tokens that it may name.
        messages: The conversation.
        options: Further arguments of `render_jinja_template` of transformers.

    Returns:
        The text, and the spans that the template marks as generated.

    Raises:
        RenderError: The template raises an error, or takes too much time, memory or text.
    """

    def ask(connection: Connection) -> Rendered | str:
        connection.send((source, dict(special_tokens), [dict(message) for message in messages], dict(options)))
        if not connection.poll(SECONDS):
            raise RenderError(f"it takes more than {SECONDS:.0f} seconds")
        answer: Rendered | str = connection.recv()
        return answer

    with _lock:
        process = _processes.get(os.getpid())
        if process is None:
            process = _processes[os.getpid()] = PipedProcess(_serve, (), name="chat template")
            process.call(Connection.recv)  # it has imported what it needs
        try:
            answer = process.call(ask)
        except BaseException as error:
            _processes.pop(os.getpid()).close()
            if isinstance(error, RuntimeError):
                raise RenderError("its process died; it may need too much memory") from error
            raise
    if isinstance(answer, str):
        raise RenderError(answer)
    return answer


def _serve(connection: Connection) -> None:
    from transformers.utils import chat_template_utils

    render: Any = chat_template_utils.render_jinja_template  # typed as if it returned a string
    _limit_memory()
    connection.send(None)
    while True:
        source, special_tokens, messages, options = connection.recv()
        try:
            [text], spans = render(conversations=[messages], chat_template=source, **special_tokens, **options)
            limit = _CHARACTERS + _PER_CHARACTER * sum(len(message["content"]) for message in messages)
            answer: Rendered | str = (text, [tuple(span) for span in spans[0]] if spans else [])
            if len(text) > limit:
                answer = f"its text has {len(text):,} characters, more than {limit:,}"
        except Exception as error:  # a template is code, which may raise anything
            answer = first_line(error)
        connection.send(answer)


def _limit_memory() -> None:
    """Let larger allocations raise MemoryError. Where the system has no such limit, that of time remains."""
    try:
        import resource

        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (size + _MEMORY, hard))
    except (ImportError, OSError, ValueError):  # Windows, macOS, or a smaller limit that holds already
        return
