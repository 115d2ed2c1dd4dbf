"""A small model with a state outside of its weights, and its config, for runs of a second."""
import random
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.model import BaseDataPreprocessor, BaseModel
from torch import nn
from torch.utils.data import Dataset

from mmeffformer.engine.runner import Runner

STEP = dict(type='MultiStepLR', by_epoch=False, milestones=[2, 5], gamma=0.5)


class Numbers(Dataset):
    metainfo = dict(classes=('number',))

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return dict(inputs=torch.full((3,), float(index)))


class DrawnScale(BaseDataPreprocessor):
    """Scales batches by a factor that is drawn every third batch."""

    def __init__(self):
        super().__init__()
        self.factor, self.batches = None, 0

    def forward(self, data, training=False):
        if self.factor is None or self.batches % 3 == 0:
            self.factor = random.random()
        self.batches += 1
        return {name: value * self.factor for name, value in super().forward(data).items()}


class Counting(BaseModel):
    def __init__(self, data_preprocessor=None):
        super().__init__(data_preprocessor)
        self.linear, self.losses = nn.Linear(3, 1), []

    def forward(self, inputs, mode='loss'):
        loss = (self.linear(inputs) * (1 + len(self.losses))).square().mean()
        self.losses.append(loss.item())
        return dict(loss=loss)


def toy_config(work_dir: Path, **edits) -> Config:
    return Config(dict(dict(
        model=dict(type=Counting, data_preprocessor=dict(type=DrawnScale)),
        train_dataloader=dict(
            batch_size=2, num_workers=0, dataset=dict(type=Numbers),
            sampler=dict(type='InfiniteSampler'), collate_fn=dict(type='default_collate')),
        train_cfg=dict(by_epoch=False, max_iters=7),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)), param_scheduler=[STEP],
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1)),
        log_processor=dict(by_epoch=False), randomness=dict(seed=3),
        experiment_name=work_dir.name, work_dir=str(work_dir)), **edits))


def train_toy(work_dir: Path, **edits) -> Runner:
    runner = Runner.from_cfg(toy_config(work_dir, **edits))
    runner.train()
    return runner
