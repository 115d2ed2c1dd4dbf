"""Settings for small detectors."""
# Heads of a detector take most of the time.
NARROW = {f'model.{key}': 32 for key in (
    'neck.out_channels', 'rpn_head.in_channels', 'rpn_head.feat_channels',
    'roi_head.bbox_roi_extractor.out_channels', 'roi_head.mask_roi_extractor.out_channels',
    'roi_head.bbox_head.in_channels', 'roi_head.bbox_head.fc_out_channels',
    'roi_head.mask_head.in_channels', 'roi_head.mask_head.conv_out_channels')}
