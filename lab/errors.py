"""The one exception that a user sees, as one line."""


class UserError(Exception):
    """A problem that the user can solve. Scripts print it as one line and exit with code 2."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
