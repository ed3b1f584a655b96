"""Names and constants that the configuration and the library share."""

from typing import Literal

BackboneName = Literal["resnet18", "resnet34", "resnet50", "resnet101", "small_cnn"]
StemName = Literal["auto", "imagenet", "small"]
ProjectionName = Literal["mlp", "mlp_bn", "linear"]
OptimizerName = Literal["sgd", "adamw", "lars", "muon"]

InitializationMode = Literal["running", "batch", "frozen", "gaussian"]
SamplingMode = Literal["random", "recent"]
LossForm = Literal["mixture", "cross_entropy"]
Kernels = Literal["torch", "triton"]
# Below it, exp(1 / temperature) summed over 30 million classes exceeds float32's range; see classifier/softmax.py.
MIN_TEMPERATURE = 0.03

# How W lies on the ranks, as the planner compares it: this code, and what dense logits would take.
Layout = Literal["sharded", "replicated", "sharded, dense", "replicated, dense"]
LAYOUTS: tuple[Layout, ...] = ("sharded", "replicated", "sharded, dense", "replicated, dense")

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
