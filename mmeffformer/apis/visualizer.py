"""Drawing of detections by OpenCV, with labels next to small objects."""
from typing import Optional, Sequence, Tuple

import cv2
import numpy as np
from mmdet.structures.mask import BitmapMasks, PolygonMasks
from mmdet.visualization import DetLocalVisualizer
from mmdet.visualization.palette import get_palette
from mmengine.structures import InstanceData

from ..utils.registry import VISUALIZERS

FONT, SIZE, PAD = cv2.FONT_HERSHEY_SIMPLEX, 0.38, 2


@VISUALIZERS.register_module()
class DetVisualizer(DetLocalVisualizer):
    """mmdet's DetLocalVisualizer, with OpenCV: matplotlib takes seconds for tens of objects.

    A label is inside its box if it covers a small part of it, and else next to it. Where it would
    cover another small object or another label, it is left out; the colour still names the class.
    """

    def _draw_instances(self, image: np.ndarray, instances: InstanceData,
                        classes: Optional[Sequence[str]], palette: Optional[list]) -> np.ndarray:
        image = np.ascontiguousarray(image).copy()
        labels = np.asarray(instances.labels, int)
        number = int(labels.max(initial=-1)) + 1
        known = get_palette(palette if len(palette or ()) >= number else None, number)
        colours = [tuple(map(int, known[label])) for label in labels]
        masks = _masks(instances)
        for mask, colour in zip(masks, colours):
            _draw_mask(image, mask, colour)
        boxes = np.asarray(instances.get('bboxes', ())).round().astype(int).reshape(-1, 4)
        if not boxes.any():  # of a network that has no boxes
            boxes = np.array([*map(cv2.boundingRect, masks)], int).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        for box, area, colour in zip(boxes.tolist(), areas, colours):
            cv2.rectangle(image, box[:2], box[2:], colour, 1 if area < 1000 else 2)
        names = instances.get('label_names') or [
            classes[label] if classes else f'class {label}' for label in labels]
        order = [*range(len(labels))]
        if 'scores' in instances:
            scores = np.asarray(instances.scores)
            names = [f'{name} {score:.0%}' for name, score in zip(names, scores)]
            order = np.argsort(-scores).tolist()
        _draw_labels(image, boxes, areas, names, order)
        return image


def _masks(instances: InstanceData) -> np.ndarray:
    masks = instances.get('masks', ())
    if isinstance(masks, (BitmapMasks, PolygonMasks)):
        masks = masks.to_ndarray()
    return np.asarray(masks, np.uint8)


def _draw_mask(image: np.ndarray, mask: np.ndarray, colour: Tuple[int, ...]) -> None:
    x, y, width, height = cv2.boundingRect(mask)
    part, inside = (array[y:y + height, x:x + width] for array in (image, mask))
    part[inside > 0] = (0.5 * part[inside > 0] + 0.5 * np.array(colour)).astype(np.uint8)
    contours, _ = cv2.findContours(inside, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE,
                                   offset=(x, y))
    cv2.drawContours(image, contours, -1, (255, 255, 255), 1)


def _draw_labels(image: np.ndarray, boxes: np.ndarray, areas: np.ndarray, names: Sequence[str],
                 order: Sequence[int]) -> None:
    """Draw names where they cover neither a small object nor each other, the first ones first."""
    height, width = image.shape[:2]
    taken: np.ndarray = np.zeros((0, 4), int)
    for i in order:
        (text_width, text_height), descent = cv2.getTextSize(names[i], FONT, SIZE, 1)
        w, h = text_width + 2 * PAD, text_height + descent + PAD
        x1, y1, x2, y2 = boxes[i]
        # Inside, above, below and to the sides of the box
        places = np.array([(x1, y1), (x1, y1 - h), (x2 - w, y1 - h), (x1, y2 + 1),
                           (x2 - w, y2 + 1), (x2 + 1, y1), (x1 - w, y1)])
        places = np.concatenate([places, places + (w, h)], 1)
        obstacles = np.concatenate([boxes[areas < 6 * w * h], taken])[:, None]
        sides = (np.minimum(places[:, 2:], obstacles[..., 2:])
                 - np.maximum(places[:, :2], obstacles[..., :2]))
        free = ~(sides > 0).all(2).any(0) & (places >= 0).all(1) & (
            places[:, 2:] <= (width, height)).all(1)
        if free.any():
            taken = np.append(taken, places[free][:1], 0)
            x, y = taken[-1, :2].tolist()
            image[y:y + h, x:x + w] //= 4
            cv2.putText(image, names[i], (x + PAD, y + text_height + PAD // 2), FONT, SIZE,
                        (255, 255, 255), 1, cv2.LINE_AA)
