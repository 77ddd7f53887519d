"""The error that a command reports as one line."""


class UserError(Exception):
    """What the user can put right: the message names the offending value and the way out."""
