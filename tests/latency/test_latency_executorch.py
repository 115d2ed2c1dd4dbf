"""ExecuTorch as a timed runtime: `make executorch-test` installs it."""
import pytest
import torch
from support.helpers import assert_close

from mmeffformer.latency import phone
from mmeffformer.latency.building import build
from mmeffformer.latency.candidates import Candidate, Setting
from mmeffformer.latency.measuring import new_header
from mmeffformer.latency.parts import build_part, open_part
from mmeffformer.latency.table import BLOCKS, Part

pytest.importorskip('executorch.runtime')
TINY = Setting(shape=(64, 96))


def test_candidates_compute_the_features_of_pytorch(tmp_path):
    for model in ('l1', 'timm:resnet18'):  # compared when exported, and not
        expected = build(Candidate(model), TINY, tmp_path).call()
        assert_close(build(Candidate(model, 'executorch'), TINY, tmp_path).call(), expected, 1e-4)


@pytest.mark.parametrize('part', [
    Part('MB3D', 3, (16, )), Part('embedding', 2, (16, 32))], ids=str)
def test_copies_compute_what_a_network_computes(part, monkeypatch, tmp_path):
    shape = (64, 96)
    monkeypatch.setattr('mmeffformer.latency.parts.COPIES', (2, 3))
    torch.manual_seed(0)
    module, image = build_part(part, 3, shape)
    with torch.no_grad():
        expected = module(image)
    torch.manual_seed(0)
    call, count = open_part(part, new_header('executorch', shape), tmp_path)
    outputs = call()
    assert count == 3 and len(outputs) == (1 if part.kind in BLOCKS else 3)
    assert len({output.numpy().tobytes() for output in outputs}) == len(outputs)
    if part.kind not in BLOCKS:
        expected = expected.mean((2, 3), keepdim=True)
    assert_close(outputs[-1:], [expected], 1e-4)


def test_files_of_a_phone(tmp_path):
    header = phone.phone_header('executorch', (64, 64), (16, 16, 16, 16), 16)
    row = next(row for row in phone.rows_of(header) if row.name == 'overhead 1')
    phone._export(row, tmp_path / 'overhead.pte', header)
    assert (tmp_path / 'overhead.pte').stat().st_size > 1e5
