"""Errors that end a program with their message alone."""


class TrainingStopped(RuntimeError):
    """A training cannot go on; the message says why, and from where it can be gone on with."""
