"""Checks of the data that a config names, as the model, the loss and the metrics see them."""
import io
import random
from collections import Counter
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence

import numpy as np
import torch
from mmengine import DefaultScope
from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

from ..utils.config import model_cfg
from .agreement import (
    check_batches,
    check_heads,
    check_loader,
    check_metrics,
    check_palette,
    heads_of,
    labels_of,
)
from .ground_truth import LIMIT, check_best_figures, metric_cfgs
from .samples import SHOWN, Listing, Sample, observed_datasets, own_pipelines, read_samples
from .traced import ADVICE, TracedDataset, explain

SHARE = 0.1  # of the objects; where more are left out, a warning gives the reasons
Progress = Callable[[str, int, int], Any]


@dataclass
class Report:
    """The findings of a check. With ``errors``, training fails or its figures are wrong."""
    errors: List[str] = field(default_factory=list)
    warnings: List[str] = field(default_factory=list)
    notes: List[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f'{kind}: {text}' for kind, texts in (
            ('note', self.notes), ('warning', self.warnings), ('error', self.errors))
            for text in texts]
        return '\n'.join([*lines, f'errors: {len(self.errors)}, warnings: {len(self.warnings)}'])


def check_data(cfg: Any, splits: Sequence[str] = ('train', 'val'), limit: Optional[int] = None,
               workers: int = 2, progress: Optional[Progress] = None,
               model: Optional[nn.Module] = None,
               loaders: Optional[Dict[str, Callable[[], DataLoader]]] = None) -> Report:
    """Check the data sets, the model and the evaluators of a config together.

    Each data set is built as the Runner builds it. Its samples go through their own pipeline, and
    their ground truth through the evaluator as perfect predictions.

    Args:
        cfg (mmengine.Config): A config of mmdet or mmseg.
        splits: Of 'train', 'val' and 'test'; those that the config lacks are skipped.
        limit: Number of samples of each data set, at equal distances; by default all. With a
            limit, evaluators of more than :data:`LIMIT` images are left out.
        workers: Processes that prepare samples, at least 1.
        progress: Called with the step, and the number of samples done and of all.
        model: The model of the config, if it is built.
        loaders: Split -> function that builds its loader, by default that of mmengine's Runner.
    """
    report, seen = Report(), []
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope')), _kept_random_states():
        try:
            model = model or MODELS.build(model_cfg(cfg))
        except Exception as error:  # any that a part may have
            report.errors.append(explain('the model cannot be built', error))
            return report
        for split in splits:
            key, loader_cfg = f'{split}_dataloader', cfg.get(f'{split}_dataloader')
            parts = (loader_cfg, cfg.get(f'{split}_evaluator'))
            if not loader_cfg or parts in seen:
                continue
            seen.append(parts)
            build = (loaders or {}).get(split) or (
                lambda given=loader_cfg: Runner.build_dataloader(given, seed=0))
            with observed_datasets() as listings, redirect_stdout(io.StringIO()):
                try:
                    loader = build()
                except Exception as error:  # any that a data set may have
                    _report_listings(listings, key, report, error)
                    continue
            _report_listings(listings, key, report)
            _check_split(cfg, split, loader, model, limit, workers, progress, report)
    return report


def _report_listings(listings: Sequence[Listing], key: str, report: Report,
                     error: Optional[Exception] = None) -> None:
    errors = [f'{key}: {text}' for listing in listings for text in listing.errors()]
    if error is not None and not errors:
        file = vars(listings[-1].dataset).get('ann_file') if listings else None
        origin = f' from {file}' if file else ''
        errors = [explain(f'{key}.dataset cannot be built{origin}', error)]
    report.errors += errors
    report.warnings += [f'{key}: {text}' for listing in listings
                        for text in listing.warnings(SHARE)]


def _check_split(cfg: Any, split: str, loader: DataLoader, model: nn.Module,
                 limit: Optional[int], workers: int, progress: Optional[Progress],
                 report: Report) -> None:
    key, dataset = f'{split}_dataloader', loader.dataset
    while isinstance(dataset, TracedDataset):
        dataset = dataset.dataset
    meta = getattr(dataset, 'metainfo', {})
    report.errors += [error for error in check_heads(model, meta.get('classes'), f'{split} data')
                      if error not in report.errors]
    report.errors += check_loader(loader, key)
    report.warnings += check_palette(meta.get('classes'), meta.get('palette'), f'{key}.dataset')
    for source in own_pipelines(dataset):
        samples = []
        for sample in read_samples(source, labels_of(heads_of(model)), limit, workers):
            samples.append(sample)
            if progress:
                progress(f'{split}: preparing samples', len(samples),
                         min(limit or len(source), len(source)))
        _report_samples(samples, meta.get('classes') or (), key, split == 'train',
                        len(samples) == len(source), report)
        report.errors += check_batches(model, loader, cfg[key].get('batch_size', 1), source,
                                       samples, key, split == 'train')
    evaluator = cfg.get(f'{split}_evaluator')
    if split == 'train' or not evaluator:
        return
    key = f'{split}_evaluator'
    report.errors += check_metrics(model, metric_cfgs(evaluator), key)
    if limit and len(dataset) > LIMIT:
        report.notes.append(f'{key}: the ground truth of {len(dataset):,} images is not evaluated '
                            f'here; {ADVICE}')
        return
    if progress:
        progress(f'{split}: evaluating the ground truth', 0, 0)
    errors, warnings, notes = check_best_figures(evaluator, dataset, key)
    report.errors += errors
    report.warnings += warnings
    report.notes += notes


def _report_samples(samples: Sequence[Sample], classes: Sequence[str], key: str, training: bool,
                    complete: bool, report: Report) -> None:
    broken = [sample.error for sample in samples if sample.error]
    report.errors += broken[:SHOWN]
    if len(broken) > SHOWN:
        report.errors.append(f'{key}: and {len(broken) - SHOWN:,} more samples')
    known = [sample.left for sample in samples if sample.left is not None]
    left = sum(known, Counter())
    reasons = sum((sample.reasons for sample in samples), Counter())
    usable = {label: number for label, number in left.items() if 0 <= label < len(classes)}
    report.notes.append(f'{key}: {len(samples):,} samples; ' + ', '.join(
        f'{classes[label]} {number:,}' for label, number in sorted(usable.items())))
    if not (training and classes and known):
        return
    if not usable:
        why = f' ({_listed(reasons)})' if reasons else ''
        report.errors.append(f'{key}: no usable object is left in {len(samples):,} samples{why}: '
                             'training would learn nothing')
    elif sum(reasons.values()) > SHARE * (count := sum(sample.given for sample in samples)):
        report.warnings.append(f'{key}: training leaves out {sum(reasons.values()):,} of '
                               f'{count:,} objects ({_listed(reasons)})')
    absent = [str(name) for label, name in enumerate(classes) if label not in usable]
    if absent and usable and complete:
        report.warnings.append(
            f'{key}: there is no object of {", ".join(absent[:10])}'
            + (f' and {len(absent) - 10} more classes' if len(absent) > 10 else ''))


def _listed(reasons: Dict[str, int]) -> str:
    return ', '.join(f'{name}: {number:,}' for name, number in reasons.items() if number)


@contextmanager
def _kept_random_states() -> Iterator[None]:
    """Context manager: keep the random numbers of the program as they are without a check."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
