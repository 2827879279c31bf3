"""The one exception that a user sees, as one line."""


class UserError(Exception):
    """A problem that the user can solve. Scripts print it as one line and exit with code 2."""


def one_line(error: BaseException, length: int = 200) -> str:
    """Return an error's message on one line, cut at `length`, or its type if it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= length else f"{text[:length]} ..."
