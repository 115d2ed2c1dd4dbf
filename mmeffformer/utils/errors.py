"""Errors that end a program with their message alone."""


class TrainingStopped(RuntimeError):
    """The training cannot continue; the message has the reason and where to resume from."""


def explain_import_error(error: ImportError) -> str:
    """Return a message that names the missing package and how to install it."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition('.')[0]
        return f'package {package!r} is not installed; install it with `pip install {package}`'
    return f'a package is missing: {error}'
