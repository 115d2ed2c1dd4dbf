"""Errors that end a program with their message alone."""


class TrainingStopped(RuntimeError):
    """The training cannot continue; the message has the reason and where to resume from."""
