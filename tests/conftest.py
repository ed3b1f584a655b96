"""The suite is about CPU ranks: a GPU in the machine must not draw some of the work away."""

import os

os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")

from shared_pipeline import evaluated, pipeline  # noqa: F401  fixtures of the whole session
