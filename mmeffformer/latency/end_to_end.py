"""Time from an image file to the drawn prediction, by stage and runtime."""
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import cv2
import numpy as np
import torch
from mmcv.transforms import Compose
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from torch import nn

from ..datasets.shapes import draw
from ..deploy.evaluation import ExportedModel
from ..deploy.inputs import read_pictures
from ..deploy.runtimes import ExportedFile
from ..models.fuse import fuse
from ..utils.config import dataset_metainfo, test_pipeline_cfg
from ..utils.stopwatch import POST_PROCESSING, Stopwatch, watch
from ..weights.compatibility import load_compatible
from .benchmark import NONE, format_ms
from .candidates import Setting
from .results import Results, header, machine
from .timing import Progress, interleave, no_progress
from .whole import exported, random_model, set_score_threshold

RUNTIMES = ('pytorch', 'onnx', 'openvino')
# Stages and their sections of the stopwatch; the network is what remains.
STAGES = {'decode': 'decode', 'pipeline': 'pipeline', 'normalise': 'data_preprocessor',
          'network': '', 'post-processing': POST_PROCESSING, 'drawing': 'drawing'}
IMAGES, IMAGE_SIZE = 8, (480, 640)  # drawn if none are given; H, W in px, as in COCO
DRAWN, SCORE = 10, 0.3  # detections drawn with random weights; least score of trained ones
PERCENTILES = (50, 90, 99)
LEGEND = ('Stages: median ms. Percentiles: ms of all stages together. '
          'Throughput: images per second without drawing.')
Drawer = Callable[[Any, np.ndarray], np.ndarray]


def draw_images(folder: Path) -> List[Path]:
    """Draw JPEG files into a folder and return them."""
    files = [folder / f'{i}.jpg' for i in range(IMAGES)]
    for i, file in enumerate(files):
        cv2.imwrite(str(file), draw(np.random.default_rng(i), IMAGE_SIZE)[0])
    return files


def run(cfg: Config, checkpoint: Optional[str], make_drawer: Callable[[dict, float], Drawer],
        files: Sequence[Path], runtimes: Sequence[str], setting: Setting, rounds: int,
        streams: int = 1, progress: Progress = no_progress) -> Results:
    """Time a detector or segmentor in several runtimes, interleaved; return the results.

    A runtime that fails is in the results with the reason.

    Args:
        checkpoint: The file with the model's weights; None leaves random weights.
        make_drawer: Maps the classes and the palette, and the least score of detections to draw,
            to a function that draws a prediction on a copy of its image.
        files: Images; each round takes the next one.
        runtimes: From ``RUNTIMES``.
        setting: Threads, and the images at once in PyTorch, whose throughput is measured if they
            are more than one. Its shape is not used.
        streams: Images at once in an exported file; its throughput is measured if more than one.

    Raises:
        ValueError: The config has no test pipeline or model, the checkpoint does not fit it, or
            an image cannot be read.
    """
    torch.set_num_threads(setting.threads)
    model, reader = random_model(cfg), Reader(cfg)
    meta = load_compatible(model, checkpoint) if checkpoint else None
    inputs = read_pictures(cfg, model.data_preprocessor, list(map(str, files)))
    shapes = list(dict.fromkeys(tuple(image.shape[2:]) for image in inputs))
    if not checkpoint:
        set_score_threshold(model, inputs[0])
    entries = {name: dict(error=None, stages_ms=[], at_once=1, throughput=None)
               for name in runtimes}
    head = dict(header(setting, rounds, 0), images=len(files), shapes=shapes,
                trained=bool(checkpoint))
    with tempfile.TemporaryDirectory() as folder:
        models = _open_all(model, entries, shapes, Path(folder), setting.threads, progress)
        for name, each in models.items():
            at_once = setting.batch if name == 'pytorch' else streams
            if at_once > 1:
                progress(f'throughput of {name}', 0, 0)
                entries[name].update(at_once=at_once, throughput=throughput(
                    each, reader, files, at_once, max(rounds, 2 * at_once), setting.threads))
        first, = _predict(model, reader(files[0])[0])
        score = SCORE if checkpoint else _least_score(first)
        drawer = make_drawer(dataset_metainfo(cfg, meta), score)
        samples = {name: entries[name]['stages_ms'] for name in models}
        _time_stages(model, models, reader, drawer, files, samples, head, progress)
    return dict(header=head, runtimes=entries)


def _open_all(model: nn.Module, entries: Dict[str, Dict[str, Any]],
              shapes: Sequence[Tuple[int, int]], folder: Path, threads: int, progress: Progress
              ) -> Dict[str, nn.Module]:
    """Return the model for each runtime, and fuse it. An error becomes the entry's ``error``."""
    models = {}
    for i, name in enumerate(entries):
        progress(f'building {name}', i, len(entries))
        try:
            models[name] = model if name == 'pytorch' else exported(
                model, name, 'fp32', shapes[0], folder, threads, dynamic=len(shapes) > 1)
        except Exception as error:  # exporters and runtimes share no exception class
            entries[name]['error'] = f'{type(error).__name__}: {error}'
    fuse(model).to(memory_format=torch.channels_last)  # files are made of it as it was
    return models


class Reader:
    """Reads image files by the test pipeline of a config.

    Args:
        cfg: A config of mmdet or mmseg, whose scope is the default scope.
    """

    def __init__(self, cfg: Config):
        self.decode, *self.steps = Compose(test_pipeline_cfg(cfg)).transforms

    def __call__(self, file: Path, stopwatch: Optional[Stopwatch] = None
                 ) -> Tuple[dict, np.ndarray]:
        """Return the model's data and the image as it was loaded; time 'decode', 'pipeline'."""
        stopwatch = stopwatch or Stopwatch()
        with stopwatch.section('decode'):
            data = self.decode(dict(img_path=str(file), img_id=0, seg_fields=[]))
            image = np.array(data['img'])
        with stopwatch.section('pipeline'):
            for step in self.steps:
                data = step(data)
        return data, image


def _least_score(sample: Any) -> float:
    """Return the score that ``DRAWN`` detections reach."""
    scores = sample.get('pred_instances', {}).get('scores', ())
    return scores.sort(descending=True)[0][:DRAWN].min().item() if len(scores) else SCORE


def _predict(model: nn.Module, *data: dict) -> List[Any]:
    with torch.no_grad():
        return model.test_step(pseudo_collate(data))


def throughput(model: nn.Module, read: Reader, files: Sequence[Path], at_once: int, count: int,
               threads: int) -> float:
    """Return the images per second from files to predictions, not drawn.

    Args:
        model: One of an exported file predicts for ``at_once`` images in as many Python
            threads, another model in a batch.
        count: Number of images.
        threads: CPU threads of all together.
    """
    count -= count % at_once
    chosen = list(islice(cycle(files), count))
    if not isinstance(model, ExportedModel):
        _predict(model, *(read(file)[0] for file in chosen[:at_once]))
        start = time.perf_counter()
        for i in range(0, count, at_once):
            _predict(model, *(read(file)[0] for file in chosen[i:i + at_once]))
        return count / (time.perf_counter() - start)
    file = model.file
    model = ExportedModel(model.model, ExportedFile(file.path, file.to, threads, at_once))
    torch.set_num_threads(max(1, threads // at_once))  # of each stream, in post-processing
    try:
        with ThreadPoolExecutor(at_once) as pool:
            def predict(path: Path) -> None:
                _predict(model, read(path)[0])

            list(pool.map(predict, chosen[:at_once]))
            start = time.perf_counter()
            list(pool.map(predict, chosen))
            return count / (time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)


def _time_stages(model: nn.Module, models: Dict[str, nn.Module], read: Reader, drawer: Drawer,
                 files: Sequence[Path], samples: Dict[str, List], head: Dict[str, Any],
                 progress: Progress) -> None:
    """Append the ms of all stages in each round to ``samples``. Ctrl-C ends early."""
    # Exported models share its preprocessor and heads, and segmentors are copies of it.
    copies = {id(each.model): each.model for each in models.values()
              if isinstance(each, ExportedModel)}
    stopwatch = watch(*{id(model): model, **copies}.values())

    def timer(each: nn.Module) -> Callable[[], Dict[str, float]]:
        of_rounds = cycle(files)
        for _ in range(2):
            _chain(each, read, drawer, files[0], stopwatch)
        return lambda: _chain(each, read, drawer, next(of_rounds), stopwatch)

    timers = {name: timer(each) for name, each in models.items()}
    try:
        for found in interleave(timers, head['rounds'], head['seed'], progress):
            for name, stages in found.items():
                samples[name].append(stages)
            head['rounds_done'] += 1
    except KeyboardInterrupt:
        head['interrupted'] = True


def _chain(model: nn.Module, read: Reader, drawer: Drawer, file: Path, stopwatch: Stopwatch
           ) -> Dict[str, float]:
    """Return the ms of each stage for one image."""
    stopwatch.take()
    start = time.perf_counter()
    data, image = read(file, stopwatch)
    sample, = _predict(model, data)
    with stopwatch.section('drawing'):
        drawer(sample, image)
    total, sections = 1e3 * (time.perf_counter() - start), stopwatch.take()
    stages = {stage: sections.get(section, 0.) for stage, section in STAGES.items()}
    stages['network'] = total - sum(stages.values())
    return stages


def table(results: Results) -> Tuple[List[str], List[List[str]]]:
    """Return the columns, and one row of texts per runtime, failed ones included."""
    entries = results['runtimes']
    columns = ['runtime', *STAGES, *(f'{p} %' for p in PERCENTILES), 'images/s', 'throughput']
    rows = []
    for name, entry in entries.items():
        if not entry['stages_ms']:
            why = ' '.join((entry['error'] or 'no round was finished').split())[:160]
            rows.append([name, f'failed: {why}', *[NONE] * (len(columns) - 2)])
            continue
        totals = [sum(stages.values()) for stages in entry['stages_ms']]
        medians = [np.median([stages[stage] for stages in entry['stages_ms']])
                   for stage in STAGES]
        rows.append([name, *map(format_ms, [*medians, *np.percentile(totals, PERCENTILES)]),
                     f'{1e3 / np.mean(totals):.3g}', NONE if not entry['throughput'] else
                     f'{entry["throughput"]:.3g} ({entry["at_once"]} '
                     f'{"in a batch" if name == "pytorch" else "streams"})'])
    return columns, rows


def notes(results: Results) -> List[str]:
    """Return lines on the machine, the images and the rounds."""
    head = results['header']
    shapes = ', '.join(f'{height} x {width}' for height, width in head['shapes'][:3])
    more = ', ...' * (len(head['shapes']) > 3)
    return [f'{machine(results)}; {head["date"]}',
            f'{head["images"]} images, padded to {shapes}{more} px; '
            f'{"trained" if head["trained"] else "random"} weights',
            f'{head["rounds_done"]} of {head["rounds"]} rounds, each of one image in all runtimes '
            'in shuffled order']
