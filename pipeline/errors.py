"""The one exception that a user is meant to read. Floor 0."""


class UserError(Exception):
    """Bad input: a configuration, a file, a data set or a server that cannot be used.

    The message is one line a problem, each naming the key or file, what was found and what is
    allowed. The commands print it without a traceback and exit with code 2.
    """
