"""Functions shared by tests."""
import gc
import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from argparse import ArgumentParser
from copy import deepcopy
from pathlib import Path
from typing import Callable, Mapping, Optional, Sequence

import mmengine
import pytest
import torch
import yapf.yapflib.yapf_api

from mmeffformer import EfficientFormer, load_weights
from mmeffformer.weights import convert

ROOT = Path(__file__).resolve().parents[2]
# Otherwise torch initialises CUDA on import, and forked processes could not use GPUs.
os.environ.setdefault('PYTORCH_NVML_BASED_CUDA_CHECK', '1')
# Its processes start with all imports done, which take longer than most tools.
FORKS = multiprocessing.get_context('forkserver')
FORKS.set_forkserver_preload(['mmeffformer.engine.runner', 'mmdet.apis', 'mmseg.apis', __name__])
# mmengine formats each config that it logs or saves, which takes most of the time of a short run.
# Unformatted configs are valid Python too.
for module in (mmengine.config.config, yapf.yapflib.yapf_api):  # older versions: in the former
    module.FormatCode = lambda text, **_: (text, True)


def image(height: int, width: int, batch: int = 1, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, dtype=dtype,
                       generator=torch.Generator().manual_seed(height * width))


def assert_close(actual, expected, relative: float = 1e-5):
    """Compare lists of tensors, each relative to its largest value."""
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=relative * b.abs().max().item())


def assert_losses_close(reference, features, backbone, outs, zero=()):
    """Compare a random loss of the outputs of two networks, and its gradients by weight.

    Each gradient must exceed noise, except for names that end in one of ``zero``.
    """
    losses = []
    for tensors in (features, outs):
        generator = torch.Generator().manual_seed(0)
        losses.append(sum((f * torch.randn(f.shape, generator=generator, dtype=f.dtype)).sum()
                          for f in tensors))
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0])
    # Gradients have the names and shapes of weights, so loading renames them.
    expected = deepcopy(backbone)
    load_weights(expected, {**reference.state_dict(), **{
        key: p.grad for key, p in reference.named_parameters() if p.grad is not None}})
    actual = dict(backbone.named_parameters())
    floor = 1e-6 * max(p.abs().max().item() for p in expected.parameters())
    for key, gradient in expected.named_parameters():
        largest = gradient.abs().max().item()
        assert largest > floor or key.endswith(tuple(zero)), key
        torch.testing.assert_close(actual[key].grad, gradient.detach(), rtol=0,
                                   atol=1e-5 * max(largest, floor), msg=key)


def made_up_table(path, shape, max_widths: Sequence[int], ms: Callable[..., float], **settings):
    """Save a latency table of this machine in which ``ms`` gives the ms of each part."""
    from mmeffformer.latency.measuring import new_header
    from mmeffformer.latency.table import LatencyTable, parts_of
    header = dict(new_header(shape=shape, max_widths=max_widths, **settings), reference_ms=1.)
    LatencyTable(header, {str(part): dict(
        kind=part.kind, stage=part.stage + 1, widths=list(part.widths), ms=ms(part))
        for part in parts_of(header)}).save(path)
    return path


def cache_published_l1(torch_home: Path):
    """Save weights of L1 with the name and layout of the published ones, as if downloaded."""
    torch.manual_seed(0)  # whatever ran before
    backbone = EfficientFormer('l1', out_norm_cfg=None)
    state = convert(backbone.state_dict(), backbone.arch, 'mmeffformer', 'transformers')
    folder = torch_home / 'hub/checkpoints'
    folder.mkdir(parents=True)
    torch.save({f'efficientformer.{key}': value for key, value in state.items()},
               folder / 'snap-research--efficientformer-l1-300--pytorch_model.bin')


def scalars(work_dir: Path) -> list:
    """Return what the newest run in a work dir logged, one dict per line."""
    newest = sorted(work_dir.glob('*/vis_data/scalars.json'))[-1]
    return [json.loads(line) for line in newest.read_text().splitlines()]


def run_tool(*command, expect: Optional[int] = 0, env=None) -> str:
    """Run a tool in another process and return its output.

    Its exit code must be ``expect``, or above 0 if that is None.
    """
    with tempfile.NamedTemporaryFile('r') as printed:
        process = FORKS.Process(target=run_here, args=(
            printed.name, [*map(str, command)], {**os.environ, **(env or {})}))
        process.start()
        process.join(600)
        hangs = process.is_alive()
        process.kill()
        process.join()
        text = printed.read()
    code = process.exitcode
    assert not hangs and (code > 0 if expect is None else code == expect), f'{code} {text[-3000:]}'
    return text


def run_here(log: str, command: Sequence[str], env: Mapping[str, str]):
    """Run a tool in this process, with its output in the file ``log``."""
    sys.stdout.flush()  # of what was imported
    gc.freeze()  # so that no collection looks at it
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = [*command]
    runpy.run_path(command[0], run_name='__main__')


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]


def run_code(code: str, *arguments, expect: int = 0) -> str:
    """Run Python code in a process without any imports and return its output."""
    done = subprocess.run([sys.executable, '-c', code, *map(str, arguments)], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600)
    assert done.returncode == expect, done.stdout[-3000:]
    return done.stdout


class Parsed(BaseException):
    """Raised instead of running a command whose options were parsed."""


def assert_parsed(tool, arguments, monkeypatch):
    """Run a tool up to the end of its parser."""
    parse_args = ArgumentParser.parse_args
    assert all((ROOT / word.partition(':')[0]).is_file()  # options of a benchmark's model follow
               for word in arguments if word.startswith('configs/'))

    def stop(self, *args, **kwargs):
        parse_args(self, *args, **kwargs)
        raise Parsed

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(ArgumentParser, 'parse_args', stop)
    monkeypatch.setattr(sys, 'argv', [tool, *arguments])
    with pytest.raises(Parsed):
        if tool.endswith('.py'):
            runpy.run_path(tool, run_name='__main__')
        else:
            runpy.run_module(tool.removeprefix('-m '), run_name='__main__')
