"""The one exception for what a user can put right, a wrong file, argument or setting, and the one warning."""


class RecycleError(ValueError):
    """Says in one message which argument or file is wrong, what was given and what is needed."""


class RecycleWarning(UserWarning):
    """Says in one message what a file leaves open or has wrong, and what is assumed instead."""
