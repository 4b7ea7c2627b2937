"""The one exception for what a user can put right: a wrong file, argument or setting."""


class RecycleError(ValueError):
    """Says in one message which argument or file is wrong, what was given and what is needed."""
