"""model-index.yml and the metafiles say what the configs do."""
import pytest
import yaml
from mmengine.config import Config

FOLDERS = ('detection', 'segmentation')
DATA = {'CocoDataset': 'COCO 2017', 'ADE20KDataset': 'ADE20K'}
FAMILIES = {
    'mmeffformer.EfficientFormer': 'EfficientFormer',
    'mmeffformer.EfficientFormerV2': 'EfficientFormerV2',
    'mmpretrain.PoolFormer': 'PoolFormer',
    'mmdet.ResNet': 'ResNet',
    'mmseg.ResNetV1c': 'ResNet',
}


@pytest.fixture
def metafiles(repo_root) -> list:
    index = yaml.safe_load((repo_root / 'model-index.yml').read_text())
    assert {*index} == {'Import'}
    return [yaml.safe_load((repo_root / path).read_text()) for path in index['Import']]


def test_every_recipe_is_listed_once(metafiles, repo_root):
    listed = [model['Config'] for metafile in metafiles for model in metafile['Models']]
    assert sorted(listed) == sorted(str(path.relative_to(repo_root)) for folder in FOLDERS
                                    for path in (repo_root / 'configs' / folder).glob('*.py'))


def test_models_are_as_their_configs(metafiles, repo_root):
    for model in (model for metafile in metafiles for model in metafile['Models']):
        cfg = Config.fromfile(repo_root / model['Config'])
        loop = cfg.train_cfg
        length = {'Iterations': loop.max_iters} if 'max_iters' in loop else {
            'Epochs': loop.max_epochs}
        assert model == {
            'Name': (repo_root / model['Config']).stem,
            'In Collection': FAMILIES[cfg.model.backbone.type],
            'Config': model['Config'],
            'Metadata': {'Training Data': DATA[cfg.train_dataloader.dataset.type], **length,
                         'Batch Size': cfg.auto_scale_lr.base_batch_size},
            # No results: these weights have not been trained.
        }


def test_collections_are_those_of_the_models(metafiles, repo_root):
    collections = [item for metafile in metafiles for item in metafile.get('Collections', ())]
    names = [item['Name'] for item in collections]
    assert sorted(names) == sorted({*FAMILIES.values()})
    for item in collections:
        assert item['Paper']['URL'].startswith('https://arxiv.org/abs/')
        assert (repo_root / item['README']).is_file()
