"""Locks that a forked process can take, though a thread of its parent held them at the fork."""

import os
import threading
from typing import Any


def renew_after_fork(owner: Any, name: str) -> None:
    """Give each forked process a new lock in place of the attribute `name` of a module or class.

    A fork copies a lock as it is but no thread other than its own, so that nothing would ever release a lock that one of them held.
    """
    if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
        os.register_at_fork(after_in_child=lambda: setattr(owner, name, threading.Lock()))
