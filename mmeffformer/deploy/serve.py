"""Exported files in the place of the models they were made from, for evaluation."""
from typing import Dict, List, Optional

import torch
from mmengine.model import BaseModel
from mmengine.structures import InstanceData
from torch import Tensor, nn

from .runtimes import ExportedFile


class ExportedModel(BaseModel):
    """An mmdet detector or mmseg segmentor that an exported file predicts for.

    Images are normalised and padded as for ``model``, then go through the file one by one.
    Masks are put into the image, and logits resized to it, by the code of ``model``, whose
    weights are not used.

    Args:
        model: The mmdet or mmseg model of the config.
        file: A whole model, from :func:`open_exported`.

    Raises:
        ValueError: The file holds a part of a model only, or is of another kind of model.
    """

    def __init__(self, model: nn.Module, file: ExportedFile):
        super().__init__(data_preprocessor=model.data_preprocessor)
        wanted = {'logits'} if hasattr(model, 'decode_head') else {'boxes', 'scores', 'labels'}
        if not wanted <= {*file.meta['outputs']}:
            raise ValueError(f'{file.path} has the outputs {", ".join(file.meta["outputs"])}; '
                             f'to evaluate the config\'s {type(model).__name__}, '
                             f'{", ".join(sorted(wanted))} are needed. Export it with '
                             '--what model, with the config that is given here')
        self.file = file
        self.__dict__['model'] = model  # not a submodule: a checkpoint of this has no weights

    def forward(self, inputs: Tensor, data_samples: Optional[List] = None, mode: str = 'predict'):
        """Predict for images (B, 3, H, W) and return their data samples with predictions.

        Raises:
            ValueError: ``mode`` is not 'predict'.
        """
        if mode != 'predict':
            raise ValueError(f'an exported model predicts only; mode={mode!r} was asked of it')
        outputs = [self.file(image[None]) for image in inputs]
        if 'logits' in outputs[0]:
            logits = torch.cat([each['logits'] for each in outputs]).to(inputs.device)
            return self.model.postprocess_result(logits, data_samples)
        found = [self._instances(each, sample.metainfo)
                 for each, sample in zip(outputs, data_samples)]
        return self.model.add_pred_to_datasample(data_samples, found)

    def _instances(self, outputs: Dict[str, Tensor], meta: dict) -> InstanceData:
        """Return one image's detections in the coordinates of the file it was read from."""
        height, width = meta['img_shape'][:2]  # without the padding, which the file has seen
        limit = torch.tensor([width, height, width, height])
        boxes = torch.minimum(outputs['boxes'], limit.to(outputs['boxes']))
        found = InstanceData(bboxes=boxes, scores=outputs['scores'], labels=outputs['labels'])
        if not len(boxes):
            if 'masks' in outputs:
                found.masks = torch.zeros(0, *meta['ori_shape'][:2], dtype=torch.bool)
        elif 'masks' in outputs:
            # It also brings the boxes, in place, to the image's own size.
            found.masks = self.model.roi_head.mask_head._predict_by_feat_single(
                outputs['masks'][:, None], boxes, torch.zeros_like(found.labels), meta,
                self.model.roi_head.test_cfg, rescale=True, activate_map=True)
        else:
            boxes /= boxes.new_tensor(meta['scale_factor']).repeat(2)
        return found
