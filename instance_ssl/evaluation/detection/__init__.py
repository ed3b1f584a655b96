"""Detection on PASCAL VOC with Faster R-CNN."""
