"""Evaluation of exported files by the evaluators of mmdet and mmseg."""
from copy import copy
from typing import List, Optional

import torch
from mmengine.config import ConfigDict
from mmengine.model import BaseModel
from mmengine.structures import InstanceData
from torch import Tensor, nn

from ..models.fuse import keep_sizes
from .runtimes import ExportedFile


class ExportedModel(BaseModel):
    """An mmdet detector or mmseg segmentor whose predictions come from an exported file.

    Images are normalised and padded as for ``model``, and go through the file one by one. The
    code of ``model`` pastes masks into the image, slides windows and resizes logits; its weights
    are not used.

    Args:
        model: The mmdet or mmseg model of the config.
        file: A file exported from the whole model.

    Raises:
        ValueError: The file was exported from a part of a model, or from another kind of model.
    """

    def __init__(self, model: nn.Module, file: ExportedFile):
        super().__init__(data_preprocessor=model.data_preprocessor)
        needed = {'logits'} if hasattr(model, 'encode_decode') else {'boxes', 'scores', 'labels'}
        if not needed <= {*file.meta['outputs']}:
            raise ValueError(f'{file.path} has the outputs {", ".join(file.meta["outputs"])}: '
                             f'evaluating {type(model).__name__} needs '
                             f'{", ".join(sorted(needed))}. Export the file from this config with '
                             '--what model')
        self.file = file
        if 'logits' in needed:
            model = copy(model)
            model.encode_decode = self._logits
            keep_sizes(model)
        self.__dict__['model'] = model  # not a submodule: its weights are in no state dict

    def forward(self, inputs: Tensor, data_samples: Optional[List] = None, mode: str = 'predict'
                ) -> List:
        """Predict for images (B, 3, H, W); return their data samples with the predictions.

        Raises:
            ValueError: ``mode`` is not 'predict'.
        """
        if mode != 'predict':
            raise ValueError(f'mode={mode!r}: an exported model predicts only')
        if hasattr(self.model, 'encode_decode'):
            return self.model.predict(inputs, data_samples)
        outputs = [self.file(image[None]) for image in inputs]
        found = []
        for each, sample in zip(outputs, data_samples):
            height, width = sample.metainfo['img_shape'][:2]  # the file saw the padding as well
            limit = each['boxes'].new_tensor([width, height, width, height])
            found.append(InstanceData(bboxes=torch.minimum(each['boxes'], limit),
                                      scores=each['scores'], labels=each['labels']))
        metas = [sample.metainfo for sample in data_samples]
        if 'mask_logits' in outputs[0]:
            found = [self._with_masks(*each) for each in zip(
                found, (each['mask_logits'] for each in outputs), metas)]
        elif 'masks' in outputs[0]:
            head = self.model.roi_head.mask_head
            # The head selects the mask of each box's class; the file has this one only.
            classes = 1 if head.class_agnostic else head.num_classes
            masks = [each['masks'][:, None].expand(-1, classes, -1, -1) for each in outputs]
            # Scales the boxes to the original image, too.
            found = head.predict_by_feat(masks, found, metas, self.model.roi_head.test_cfg,
                                         rescale=True, activate_map=True)
        else:
            for each, meta in zip(found, metas):
                each.bboxes /= each.bboxes.new_tensor(meta['scale_factor']).repeat(2)
        return self.model.add_pred_to_datasample(data_samples, found)

    def _with_masks(self, found: InstanceData, logits: Tensor, meta: dict) -> InstanceData:
        """Return detections and masks in the original image, as RTMDet-Ins predicts them."""
        head = copy(self.model.bbox_head)
        # The head computes logits from kernels, after nms that only sorts here.
        head._mask_predict_by_feat_single = lambda _, kernels, __: kernels
        found.kernels, found.priors = logits, found.bboxes
        return head._bbox_mask_post_process(found, None, ConfigDict(head.test_cfg, nms=None),
                                            rescale=True, img_meta=meta)

    def _logits(self, inputs: Tensor, _metas: List[dict]) -> Tensor:
        return torch.cat([self.file(image[None])['logits'] for image in inputs]).to(inputs.device)
