"""Private parts of mmengine and torch: each test fails where a version has moved one of them."""
import inspect
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import CheckpointHook
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop
from mmengine.runner import Runner as MMEngineRunner
from support.helpers import ROOT, run_code
from torch.utils.data import DataLoader

from mmeffformer.engine import mmengine_internals as internals


def cfg(work_dir) -> Config:
    loader = dict(dataset=dict(type='Numbers'), sampler=dict(type='InfiniteSampler'), batch_size=2)
    return dict(
        model=dict(type='Line'), work_dir=str(work_dir), train_dataloader=loader,
        train_cfg=dict(by_epoch=False, max_iters=3), randomness=dict(seed=0, diff_rank_seed=True),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=.1)), custom_hooks=[])
