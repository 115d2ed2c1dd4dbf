"""The model zoo: model-index.yml, the metafiles, the README tables made of them, mmengine.hub."""
import re

import pytest
import safetensors.torch
import torch
import yaml
from mmengine.config import Config
from mmengine.hub import get_model
from mmengine.runner.checkpoint import CheckpointLoader
from modelindex.load_model_index import load

from mmeffformer.apis.report import TABLE2, published_table, read_models
from mmeffformer.models import EfficientFormer, EfficientFormerV2
from mmeffformer.utils.registry import register_packages
from mmeffformer.weights import convert, safe_loading

FOLDERS = ('detection', 'segmentation', 'realtime', 'backbones')
DATA = {'CocoDataset': 'COCO 2017', 'ADE20KDataset': 'ADE20K'}
FAMILIES = {
    'mmeffformer.EfficientFormer': 'EfficientFormer',
    'mmeffformer.EfficientFormerV2': 'EfficientFormerV2',
    'mmpretrain.PoolFormer': 'PoolFormer',
    'mmdet.ResNet': 'ResNet',
    'mmseg.ResNetV1c': 'ResNet',
}
L1 = 'snap-research--efficientformer-l1-300--pytorch_model'  # the name of the download
BACKBONE_TABLE = {
    'top-1, %': ('Top 1 Accuracy',), 'epochs': ('Epochs',),
    'top-1 after 300 epochs, %': ('Top 1 Accuracy 300 Epochs',), 'GMACs': ('GMACs',)}


@pytest.fixture
def metafiles(repo_root) -> list:
    index = yaml.safe_load((repo_root / 'model-index.yml').read_text())
    assert {*index} == {'Import'}
    return [yaml.safe_load((repo_root / path).read_text()) for path in index['Import']]


@pytest.fixture
def models(metafiles) -> list:
    return [model for metafile in metafiles for model in metafile['Models']]


def test_every_config_is_listed_once(models, repo_root):
    assert sorted(model['Config'] for model in models) == sorted(
        str(path.relative_to(repo_root)) for folder in FOLDERS
        for path in (repo_root / 'configs' / folder).glob('*.py'))


def test_models_match_their_configs(models, repo_root):
    for model in models:
        cfg = Config.fromfile(repo_root / model['Config'])
        assert model['Name'] == (repo_root / model['Config']).stem
        backbone = cfg.model.get('backbone', cfg.model)
        assert model['In Collection'] == FAMILIES[backbone.type]
        metadata = model['Metadata']
        if backbone is cfg.model:
            assert metadata['Training Data'] == 'ImageNet-1k'
            continue
        loop, unit = cfg.train_cfg, 'Iterations' if 'max_iters' in cfg.train_cfg else 'Epochs'
        assert metadata[unit] == loop.get('max_iters', loop.get('max_epochs'))
        assert metadata['Training Data'] == DATA[cfg.train_dataloader.dataset.type]
        assert metadata['Batch Size'] == cfg.auto_scale_lr.base_batch_size
        assert 'Weights' not in model  # nobody has published any that load as they are


def test_weights_are_those_that_detectors_start_from(models, repo_root):
    urls = {model['Name']: model['Weights'] for model in models if 'Weights' in model}
    assert len(urls) == 7
    for name, url in urls.items():
        init_cfg = Config.fromfile(
            repo_root / f'configs/detection/maskrcnn_{name}.py').model.backbone.init_cfg
        hub = re.sub(r'https://huggingface.co/(.+)/resolve/main/.+', r'hf-hub:\1', url)
        assert hub == init_cfg.checkpoint


def test_results_say_where_they_are_published(models):
    without = {model['Name'] for model in models if 'Results' not in model}
    assert without == {f'{task}_effformerv2_{size}' for task in ('maskrcnn', 'semfpn')
                       for size in ('s0', 's1')} | {
        f'semfpn_resnet{depth}_mmseg160k' for depth in (18, 50, 101)} | {
        'rtmdet-ins_effformerv2_s0_640', 'rtmdet-ins_effformer_l1_640'}
    for model in models:
        paper = '2212.08059' if 'effformerv2' in model['Name'] else '2206.01191'
        assert model['Metadata'].get('Results Source') == (
            None if model['Name'] in without else f'published in https://arxiv.org/abs/{paper}')


def test_only_the_known_figures_are_unconfirmed():
    unconfirmed = {(model.name, key) for model in read_models().values()
                   for key, figure in {**model.metadata, **model.published}.items()
                   if figure.endswith('?')}
    assert unconfirmed == {('maskrcnn_resnet101', 'Classifier Params (M)'), *(
        ('maskrcnn_effformer_l7', f'{kind} AP{iou}')
        for kind in ('box', 'mask') for iou in ('', '50', '75')), *(
        (f'semfpn_resnet{depth}', 'mIoU') for depth in (18, 50, 101))}


def test_collections_are_those_of_the_models(metafiles, repo_root):
    collections = [item for metafile in metafiles for item in metafile.get('Collections', ())]
    names = [item['Name'] for item in collections]
    assert sorted(names) == sorted({*FAMILIES.values()})
    for item in collections:
        assert item['Paper']['URL'].startswith('https://arxiv.org/abs/')
        assert (repo_root / item['README']).is_file()


def test_the_model_index_library_reads_all(repo_root):
    """``mim search`` and ``mim download`` use this library."""
    models = {model.name: model for model in load(str(repo_root / 'model-index.yml')).models}
    assert len(models) == 13 + 16 + 2 + 7
    assert models['effformer_l3'].weights.endswith('efficientformer-l3_3rdparty_in1k_20220915'
                                                   '-466793d6.pth')
    box, mask = models['maskrcnn_effformer_l1'].results
    assert (box.task, box.metrics['box AP']) == ('Object Detection', 37.9)
    assert (mask.task, mask.metrics['mask AP75']) == ('Instance Segmentation', 37.3)


@pytest.mark.parametrize('path, marker, data, columns', [
    ('README.md', 'table2', ('COCO 2017', 'ADE20K'), TABLE2),
    ('configs/detection/README.md', 'results', ('COCO 2017',),
     {name: TABLE2[name] for name in TABLE2 if name != 'mIoU'}),
    ('configs/segmentation/README.md', 'results', ('ADE20K',), {'mIoU': TABLE2['mIoU']}),
    ('configs/backbones/README.md', 'results', ('ImageNet-1k',), BACKBONE_TABLE)])
def test_tables_of_the_readmes_are_made_of_the_metafiles(repo_root, path, marker, data, columns):
    text = (repo_root / path).read_text()
    table, = re.findall(f'<!-- {marker} -->\n(.*)\n<!-- /{marker} -->', text, re.DOTALL)
    assert table == published_table(
        [model for model in read_models().values() if model.data in data], columns)


# mmengine.hub ---------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The folder of downloaded files, with mmengine made to know this package."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setattr(CheckpointLoader, '_schemes', dict(CheckpointLoader._schemes))
    register_packages()
    safe_loading.install()
    (tmp_path / 'hub/checkpoints').mkdir(parents=True)
    return tmp_path / 'hub/checkpoints'


def test_hub_builds_whole_models(hub):
    model = get_model('mmeffformer::segmentation/semfpn_effformer_l1.py')
    assert type(model).__name__ == 'EncoderDecoder' and isinstance(model.backbone, EfficientFormer)
    with pytest.raises(AssertionError, match='Cannot find `Weights`'):
        get_model('mmeffformer::segmentation/semfpn_effformer_l1.py', pretrained=True)


@pytest.mark.parametrize('name, source_type, layout, prefix, file', [
    ('effformer_l1', EfficientFormer, 'transformers', 'efficientformer.', f'{L1}.bin'),
    ('effformerv2_s0', EfficientFormerV2, 'timm', '',
     'timm--efficientformerv2_s0.snap_dist_in1k--model.safetensors')])
def test_hub_loads_published_weights(hub, randomize, name, source_type, layout, prefix, file):
    source = randomize(source_type(name.partition('_')[2], out_norm_cfg=None))
    state = {prefix + key: value.contiguous() for key, value in convert(
        source.state_dict(), source.arch, 'mmeffformer', layout).items()}
    save = torch.save if file.endswith('.bin') else safetensors.torch.save_file
    save(state, hub / file)
    model = get_model(f'mmeffformer::backbones/{name}.py', pretrained=True)
    for key, value in source.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=0, atol=0, msg=key)


def test_hub_refuses_weights_of_another_network(hub):
    other = EfficientFormer('l3', out_norm_cfg=None)
    torch.save(convert(other.state_dict(), other.arch, 'mmeffformer', 'timm'),
               hub / f'{L1}.bin')
    with pytest.raises(ValueError, match='checkpoint is l3, backbone is l1'):
        get_model('mmeffformer::backbones/effformer_l1.py', pretrained=True)
