"""The experiment's sections `evaluation` and `export`: which encoder, on which images, and how."""

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from instance_ssl.config.choices import InitializationMode
from instance_ssl.config.data import DataConfig
from instance_ssl.config.detection import DetectionConfig
from instance_ssl.config.fine_tuning import FineTuneConfig, SemiSupervisedConfig
from instance_ssl.config.types import LocalPath, NonNegativeFloat, PositiveFloat, PositiveInt, Section

SourceName = Literal["pixels", "random", "trained", "weights"]
ExportFormat = Literal["pth", "safetensors", "detectron2", "onnx", "parquet"]


class KnnConfig(Section):
    """Weighted k-nearest-neighbour vote for every k and temperature in one pass; the first pair is the headline.

    k = 200 and T = 0.1 are the usual choice (MoCo's and lightly's CIFAR-10 benchmarks).
    """

    neighbours: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (200, 100, 20, 10)
    temperatures: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (0.1, 0.07, 0.2)


class RetrievalConfig(Section):
    """Retrieval among the training images, without the query itself: recall@k for every k, same-class top-1."""

    recall_at: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 2, 4, 8)


class SimilarityConfig(Section):
    """Figure 4: intra- and inter-instance cosines of every initialisation.

    Attributes:
        modes: initialisations, in the picture's order.
        num_images: size of a seeded sample; all images if there are fewer.
        num_views: random views of each image.
    """

    modes: Annotated[tuple[InitializationMode, ...], Field(min_length=1)] = ("gaussian", "frozen", "batch", "running")
    num_images: Annotated[int, Field(ge=2)] = 10_000
    num_views: Annotated[int, Field(ge=2)] = 2


class LinearConfig(Section):
    """Linear evaluation. `sgd` is the paper's protocol; `cached` fits logistic regression to features of one view."""

    protocol: Literal["sgd", "cached"] = "sgd"
    epochs: PositiveInt = 100
    global_batch_size: PositiveInt = 2048
    learning_rate: PositiveFloat = 40.0
    l2_penalties: Annotated[tuple[NonNegativeFloat, ...], Field(min_length=1)] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


class EvaluationConfig(Section):
    """What is evaluated, and on which labelled images.

    Attributes:
        sources: raw `pixels`, the `random` network, the `trained` one, or the backbone in a file of `weights`.
        checkpoint: of `trained`: a directory step_… or a run directory (its newest), of any run of the same encoder;
            None: this run's newest.
        weights: of `weights`: a safetensors or torch.save file with a backbone under torchvision's keys. If it holds
            several, file.pth#prefix selects the one below that prefix.
        data: what differs from the experiment's own `data`.
    """

    sources: Annotated[tuple[SourceName, ...], Field(min_length=1)] = ("trained",)
    checkpoint: LocalPath | None = None
    weights: LocalPath | None = None
    batch_size: PositiveInt = 256
    data: DataConfig | None = None
    knn: KnnConfig = KnnConfig()
    linear: LinearConfig = LinearConfig()
    semi_supervised: SemiSupervisedConfig = SemiSupervisedConfig()
    fine_tune: FineTuneConfig = FineTuneConfig()
    detection: DetectionConfig = DetectionConfig()
    retrieval: RetrievalConfig = RetrievalConfig()
    similarity: SimilarityConfig = SimilarityConfig()

    @model_validator(mode="after")
    def _weights_have_a_file(self) -> "EvaluationConfig":
        if "weights" in self.sources and self.weights is None:
            raise ValueError("source 'weights' needs a file: set evaluation.weights")
        return self


class ExportConfig(Section):
    """What runners/export.py writes.

    Attributes:
        source: the backbone, as in `evaluation.sources`.
        formats: of the backbone (pth, safetensors, detectron2, onnx) and of the features (parquet; npy is always
            written).
        images: a folder whose images' features and embeddings are written; None: no features.
    """

    source: Literal["random", "trained", "weights"] = "trained"
    formats: tuple[ExportFormat, ...] = ("pth", "safetensors", "detectron2", "onnx", "parquet")
    images: LocalPath | None = None

    @field_validator("formats", mode="before")
    @classmethod
    def _formats_are_of_the_backbone(cls, values: Any) -> Any:
        known = get_args(ExportFormat)
        if isinstance(values, str):
            raise ValueError(f"expected a list: [{values}]")
        unknown = [value for value in values if value not in known] if isinstance(values, list | tuple) else []
        if unknown:
            raise ValueError(
                f"{unknown[0]!r} is not one of {', '.join(known)}: the first four are of the backbone, the last of the "
                "features of the folder that export.images names, which are written as .npy in any case"
            )
        return values
