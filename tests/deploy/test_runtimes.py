"""Files that can be opened, and files that cannot."""
import sys

import pytest
from support.helpers import image, run_code

from mmeffformer import EfficientFormer
from mmeffformer.deploy.export import export
from mmeffformer.deploy.runtimes import SUFFIXES, ExportedFile


@pytest.mark.parametrize('to', ['onnx', 'openvino'])
@pytest.mark.parametrize('content', [b'', b'junk', b'<?xml version="1.0"?><net>', bytes(1000)])
def test_broken_files(to, content, tmp_path):
    path = tmp_path / f'broken{SUFFIXES[to]}'
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf'broken\{SUFFIXES[to]}.*(is broken|was not written)'):
        ExportedFile(path, to)


def test_files_that_cannot_be_opened(arch, monkeypatch, tmp_path):
    with pytest.raises(FileNotFoundError, match="'none.onnx' does not exist"):
        ExportedFile('none.onnx', 'onnx')
    path = tmp_path / 'backbone.onnx'
    export(EfficientFormer(arch), path, 'onnx', 'backbone', (64, 64))
    with pytest.raises(ValueError, match='takes images of 64 x 64 px.*has 96 x 64'):
        ExportedFile(path, 'onnx')(image(96, 64))
    with pytest.raises(ValueError, match='expected a file that ends in .xml for openvino'):
        ExportedFile(path, 'openvino')
    import onnx
    proto = onnx.load(str(path))
    del proto.metadata_props[:]
    onnx.save(proto, str(path))
    with pytest.raises(ValueError, match='was not written by tools/export.py'):
        ExportedFile(path, 'onnx')
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    with pytest.raises(ValueError, match='onnx needs the package onnxruntime'):
        ExportedFile(path, 'onnx')


CLOSE = """
import faulthandler, gc, signal, sys
from mmeffformer.deploy.runtimes import ExportedFile
faulthandler.enable()  # sets a stack for signals too
signal.signal(signal.SIGCHLD, lambda *_: None)  # as a dataloader does
first, second = (ExportedFile(sys.argv[1], 'openvino') for _ in range(2))
del first
gc.collect()
del second
gc.collect()
signal.raise_signal(signal.SIGCHLD)
"""


def test_openvino_files_close_in_any_order(arch, tmp_path):
    path = tmp_path / 'backbone.xml'
    export(EfficientFormer(arch), path, 'openvino', 'backbone', (64, 64))
    run_code(CLOSE, path)
