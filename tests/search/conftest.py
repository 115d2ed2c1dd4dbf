"""A tiny supernet in a segmentor, trained for two iterations, and a search in it."""
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from support.helpers import made_up_table

from mmeffformer.datasets import write_ade20k
from mmeffformer.search.search import Search
from mmeffformer.search.slimming import Journal
from mmeffformer.search.weights import channel_groups

WIDTHS = (16, 32, 48, 48)


def made_up_ms(part) -> float:
    """Return a made-up latency of a part."""
    cost = {'MB4D': 1., 'MB3D': 1.7, 'embedding': .3, 'stem': .5, 'overhead': 0.}[part.kind]
    return cost * sum(part.widths) / 16 + (part.kind == 'overhead')


@pytest.fixture(scope='session')
def trained(tmp_path_factory):
    """(a function that returns the config for a work dir, checkpoint, table)."""
    folder = tmp_path_factory.mktemp('search')
    write_ade20k(folder / 'data', train=8, val=4, size=(64, 96), progress=False)
    made_up_table(folder / 'table.json', (64, 96), WIDTHS, made_up_ms)

    def config(work_dir) -> Config:
        cfg = Config.fromfile('tests/data/semfpn_super_tiny.py')
        for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
            loader.dataset.data_root = str(folder / 'data')
        cfg.work_dir = str(work_dir)
        return cfg

    Runner.from_cfg(config(folder / 'train')).train()
    return config, str(folder / 'train/iter_2.pth'), str(folder / 'table.json')


@pytest.fixture(scope='session')
def slimmed(trained, tmp_path_factory):
    """(a search with a target of 9 ms, its path)."""
    config, checkpoint, table = trained
    search = Search(config(tmp_path_factory.mktemp('slimmed')), checkpoint, table, 9., batches=2)
    return search, search.slim()


@pytest.fixture
def restart(slimmed, monkeypatch, tmp_path):
    """A function that returns the search with another target, as if it was started again: with a
    journal in ``tmp_path``. Accuracies that are known stay known."""
    search, _ = slimmed

    def restarted(target: float) -> Search:
        journal = Journal(tmp_path / 'journal.json', dict(target=target))
        journal.metric = 'mIoU'
        journal.accuracies.update(search.journal.accuracies)
        monkeypatch.setattr(search, 'journal', journal)
        monkeypatch.setattr(search, 'work_dir', tmp_path)
        monkeypatch.setattr(search, 'target', target)
        monkeypatch.setattr(search, 'correction', 1.)
        return search

    return restarted


@pytest.fixture
def random_ranking():
    """A function that returns a random order of the channels of each group of a supernet."""

    def rank(supernet) -> dict:
        generator, widths = torch.Generator().manual_seed(0), supernet.arch.widths
        sizes = {'stem': widths[0] // 2}
        for i, width in enumerate(widths):
            sizes.update({f'stage.{i}': width, f'hidden.{i}': 4 * width})
        return {group: torch.randperm(sizes['.'.join(group.split('.')[:2])], generator=generator)
                for group in channel_groups(supernet)}

    return rank
