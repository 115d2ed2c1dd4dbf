"""Settings for small detectors."""
# Heads of a detector take most of the time.
NARROW = {f'model.{key}': 32 for key in (
    'neck.out_channels', 'rpn_head.in_channels', 'rpn_head.feat_channels',
    'roi_head.bbox_roi_extractor.out_channels', 'roi_head.mask_roi_extractor.out_channels',
    'roi_head.bbox_head.in_channels', 'roi_head.bbox_head.fc_out_channels',
    'roi_head.mask_head.in_channels', 'roi_head.mask_head.conv_out_channels')}


def narrow(part: dict) -> None:
    """Make a neck or head of a config 64 channels wide, for 4 classes."""
    for key in ('in_channels', 'feat_channels', 'out_channels', 'block_mid_channels'):
        if isinstance(part.get(key), int) and part[key] > 64:
            part[key] = 64
    if 'num_classes' in part:
        part['num_classes'] = 4
