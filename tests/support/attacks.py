"""Checkpoint files that run code where they are unpickled without care."""
import os

import pytest
import torch

from mmeffformer.weights import read_checkpoint


class Runs:
    """Calls a function when it is unpickled: by default, makes the folder ``marker``."""

    def __init__(self, marker, function=os.mkdir, *args):
        self.function, self.args = function, args or (str(marker),)

    def __reduce__(self):
        return self.function, self.args


def attack(path, marker):
    """Save a checkpoint that makes the folder ``marker``."""
    torch.save(dict(meta=dict(epoch=1, iter=2, extra=[{'a': Runs(marker)}]),
                    state_dict={'weight': torch.ones(1)}), path)


def refusal(path, load=read_checkpoint) -> str:
    """Return the message of the ValueError about the file."""
    with pytest.raises(ValueError) as caught:
        load(path)
    assert str(path) in str(caught.value)
    return str(caught.value)
