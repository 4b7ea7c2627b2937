"""The one exception for what a user can put right, a wrong file, argument or setting, and the one warning."""


class RecycleError(ValueError):
    """Says in one message which argument or file is wrong, what was given and what is needed."""


class RecycleWarning(UserWarning):
    """Says in one message what a file leaves open or has wrong, and what is assumed instead."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed; torch's CPU allocator raises a plain RuntimeError, the system an OSError."""
    words = ("not enough memory", "can't allocate memory", "out of memory", "Cannot allocate memory", "bad_alloc")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def first_line(error: BaseException) -> str:
    """The message of another library's error on one line, or its type where there is none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
