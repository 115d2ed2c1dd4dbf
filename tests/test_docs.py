"""The commands and the Python code in README.md and docs/."""
import doctest
import json
import os
import re
import shlex
import subprocess
from importlib.metadata import metadata
from pathlib import Path

import mmengine
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from support.helpers import assert_parsed, cache_published_l1, made_up_table

import mmeffformer
from mmeffformer.datasets import write_coco
from mmeffformer.utils.registry import MODELS
from mmeffformer.weights import convert

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / name for name in ('README.md', 'CONTRIBUTING.md')]
PAGES += sorted([*ROOT.glob('docs/**/*.md'), *ROOT.glob('configs/*/README.md')])
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding='utf-8') for path in PAGES}
JOINED = '\n'.join(re.sub(r'\s*\\\n\s*', ' ', text) for text in TEXTS.values())


def found(pattern: str) -> list:
    """Return the commands that match, in parts: what they run, and their arguments."""
    return sorted({(name, arguments.strip()) for name, arguments in re.findall(pattern, JOINED)
                   if arguments.strip()})


COMMANDS = found(r'python (tools/\S+\.py|-m mmeffformer)\b([^\n`]*)')
SCRIPTS = found(r'(tools/\w+\.sh)\b([^\n`]*)')
BLOCKS = [pytest.param(block, id=f'{name}-{number}') for name, text in TEXTS.items()
          for number, block in enumerate(re.findall(r'^```python\n(.*?)^```', text, re.M | re.S))]
SHELL = [line for block in re.findall(r'^```sh\n(.*?)^```', JOINED, re.M | re.S)
         for line in block.splitlines() if line.strip() and not line.startswith('#')]
OTHERS = {'mim', 'pip', 'pre-commit'}  # not of this project


@pytest.mark.parametrize('tool, arguments', COMMANDS, ids=str)
def test_tools_parse_the_commands(tool, arguments, monkeypatch):
    assert_parsed(tool, shlex.split(arguments, comments=True), monkeypatch)


@pytest.mark.parametrize('script, arguments', SCRIPTS, ids=str)
def test_scripts_start_tools_that_parse_the_commands(script, arguments, tmp_path, monkeypatch):
    for program in ('python', 'srun'):
        (tmp_path / program).write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        (tmp_path / program).chmod(0o755)
    printed = subprocess.run(
        ['bash', script, *shlex.split(arguments)], cwd=ROOT, text=True, check=True,
        stdout=subprocess.PIPE, env={**os.environ, 'PATH': f'{tmp_path}:{os.environ["PATH"]}'})
    words = printed.stdout.splitlines()
    start, = (number for number, word in enumerate(words) if word.startswith('tools/'))
    assert_parsed(words[start], words[start + 1:], monkeypatch)


def test_other_commands_exist():
    targets = re.search(r'^\.PHONY: (.*)', (ROOT / 'Makefile').read_text(), re.M)[1].split()
    extras = {*metadata('mmeffformer').get_all('Provides-Extra')}
    for line in SHELL:
        program, *words = [word for word in shlex.split(line, comments=True) if '=' not in word]
        if program == 'make':
            assert words[0] in targets, line
        elif program == 'pytest':
            assert (ROOT / words[0]).exists(), line
        elif program == 'python':
            assert words[:2] == ['-m', 'mmeffformer'] or words[0].startswith('tools/'), line
        else:
            assert program in OTHERS or program.startswith('tools/'), line
    assert {name for names in re.findall(r'pip install.*\.\[(.*?)\]', JOINED)
            for name in names.split(',')} <= extras


def test_every_tool_has_a_command():
    tools = {path.relative_to(ROOT).as_posix() for path in ROOT.glob('tools/**/*.py')}
    assert tools <= {tool for tool, _ in COMMANDS}
    assert {path.name for path in ROOT.glob('tools/*.sh')} == {
        Path(script).name for script, _ in SCRIPTS}


@pytest.fixture(scope='module')
def workspace(tmp_path_factory):
    """A folder with the files that the code on the pages reads, small or with random weights."""
    folder = tmp_path_factory.mktemp('docs')
    write_coco(folder / 'data/shapes', train=2, val=1, size=(64, 64), progress=False)
    write_coco(folder / 'photos', train=6, val=2, size=(64, 64), progress=False)
    (folder / 'retinanet.py').write_text(
        "_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'\n")
    network = mmeffformer.EfficientFormer('l1', out_norm_cfg=None)
    state = network.state_dict()
    torch.save(dict(model=convert(state, network.arch, 'mmeffformer', 'official')),
               folder / 'efficientformer_l1_1000d.pth')
    torch.save(dict(state_dict=state), folder / 'mine.pth')
    cache_published_l1(folder)
    (folder / 'benchmarks').mkdir()
    made_up_table(folder / 'benchmarks/latency_pytorch_224x224.json', (224, 224),
                  (48, 96, 224, 448), lambda part: 1.)
    (folder / 'exported').mkdir()
    save_detector(folder / 'exported/maskrcnn_effformer_l1_shapes_model.onnx')
    return folder


def save_detector(path):
    """Save a program that finds one object in any image."""
    values = dict(boxes=[[0., 0., 9., 9.]], scores=[.9], labels=[1], masks=[[[1.] * 28] * 28])
    tensors = {name: torch.tensor(value).numpy() for name, value in values.items()}
    outputs = [onnx.numpy_helper.from_array(value, name) for name, value in tensors.items()]
    nodes = [helper.make_node('Constant', [], [output.name], value=output) for output in outputs]
    image = helper.make_tensor_value_info('image', TensorProto.FLOAT, [1, 3, 'h', 'w'])
    model = helper.make_model(helper.make_graph(nodes, 'detector', [image], [
        helper.make_tensor_value_info(output.name, output.data_type, output.dims)
        for output in outputs]), opset_imports=[helper.make_opsetid('', 17)], ir_version=8)
    helper.set_model_props(model, {'mmeffformer': json.dumps(dict(
        mean=[0.] * 3, std=[1.] * 3, classes=['disc', 'square']))})
    onnx.save(model, path)


@pytest.fixture
def names(workspace, monkeypatch):
    """The names that the pages use without defining them, in a process of the workspace."""
    monkeypatch.chdir(workspace)
    monkeypatch.setenv('TORCH_HOME', str(workspace))
    mmeffformer.patch_mmengine()
    cfg = mmengine.Config.fromfile(ROOT / 'configs/demo/maskrcnn_effformer_l1_shapes.py')
    mmengine.registry.init_default_scope('mmdet')
    return dict(
        mmeffformer=mmeffformer, torch=torch, cfg=cfg,
        dataset=mmengine.registry.DATASETS.build(cfg.train_dataloader.dataset),
        backbone=MODELS.build(dict(type='mmeffformer.EfficientFormer', arch='l1')))


@pytest.mark.parametrize('block', BLOCKS)
def test_python_code(block, request):
    test = doctest.DocTestParser().get_doctest(block, {}, 'docs', None, 0)
    if test.examples:
        assert doctest.DocTestRunner().run(test).failed == 0
    else:
        exec(compile(block, 'docs', 'exec'), request.getfixturevalue('names'))
