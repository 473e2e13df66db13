"""Errors that another error hides."""

import errno
import os


def find_full_disk(error: BaseException | None) -> OSError | None:
    """Find an ENOSPC error anywhere in the exception chain."""
    while error is not None:
        if isinstance(error, OSError) and os.strerror(errno.ENOSPC) in str(error):
            return error
        error = error.__cause__ or error.__context__
    return None
