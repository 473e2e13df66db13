"""Which errors the command line reports in one line, and errors that another error hides."""

import errno
import os

from usdm_sft.utils.files import SUFFIX
from usdm_sft.utils.texts import first_line

_INPUT_ERRORS = (OSError, ValueError, IndexError, ImportError, MemoryError, RuntimeError)


def is_panic(error: BaseException) -> bool:
    """Return True for the panic of a library in Rust, such as tokenizers. Its class is not an Exception and cannot be imported."""
    return type(error).__name__ == "PanicException"


def describe_error(error: BaseException) -> str | None:
    """Return the message for an error of the input or the machine, or None for a mistake in the program.

    A class that a library defines, such as `datasets.exceptions.DatasetsError` or `pyarrow.ArrowException`, tells what is wrong with the
    input; tokenizers raises plain `Exception`. Other classes of Python, such as TypeError, are mistakes, whose traceback helps.
    """
    if isinstance(error, OSError) and error.strerror and isinstance(error.filename, str):  # the system's own
        name = str(error.filename2 or error.filename).removesuffix(SUFFIX)
        return f"{name} cannot be read or written ({error.strerror}): name another path, or correct what is there"
    if isinstance(error, _INPUT_ERRORS) and str(error):
        return str(error)
    kind = type(error)
    is_of_library = isinstance(error, Exception) and kind.__module__ != "builtins"
    if not (isinstance(error, _INPUT_ERRORS) or is_of_library or kind is Exception or is_panic(error)):
        return None
    reason = first_line(error.__cause__ or error)  # datasets says no more than that an error occurred
    return reason if kind is Exception or reason == kind.__name__ else f"{kind.__name__}: {reason}"


def find_full_disk(error: BaseException | None) -> OSError | None:
    """Find an ENOSPC error anywhere in the exception chain."""
    while error is not None:
        if isinstance(error, OSError) and os.strerror(errno.ENOSPC) in str(error):
            return error
        error = error.__cause__ or error.__context__
    return None
