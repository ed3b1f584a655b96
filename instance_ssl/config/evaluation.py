"""The experiment's sections `evaluation` and `export`: which encoder, on which images, and how."""

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from instance_ssl.config.choices import InitializationMode
from instance_ssl.config.data import DataConfig
from instance_ssl.config.detection import DetectionConfig
from instance_ssl.config.fine_tuning import FineTuneConfig, SemiSupervisedConfig
from instance_ssl.config.types import AUTO, LocalPath, NonNegativeFloat, PositiveFloat, PositiveInt, Section

SourceName = Literal["pixels", "random", "trained", "weights"]
ExportFormat = Literal["pth", "safetensors", "hub", "detectron2", "onnx", "parquet"]


class KnnConfig(Section):
    """Weighted k-nearest-neighbour vote, every k with every temperature in one pass; the first pair is the headline.

    k = 200 and T = 0.1 are what the field compares with (MoCo's and lightly's CIFAR-10 benchmarks).

    Attributes:
        neighbours: values of k; `auto`: those of the default that no class is smaller than on average.
        temperatures: temperatures of the vote's weights.
    """

    neighbours: Annotated[tuple[PositiveInt, ...], Field(min_length=1), AUTO] = (200, 100, 20, 10)
    temperatures: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (0.1, 0.07, 0.2)


class RetrievalConfig(Section):
    """Retrieval among the training images, each excluded from its own ranking: recall@k, same-class top-1.

    Attributes:
        recall_at: values of k.
    """

    recall_at: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 2, 4, 8)


class SimilarityConfig(Section):
    """Figure 4: intra- and inter-instance cosines of every initialisation.

    Attributes:
        modes: initialisations, in the picture's order.
        num_images: size of the seeded sample of images (at most all).
        num_views: random views per image.
    """

    modes: Annotated[tuple[InitializationMode, ...], Field(min_length=1)] = ("gaussian", "frozen", "batch", "running")
    num_images: Annotated[int, Field(ge=2)] = 10_000
    num_views: Annotated[int, Field(ge=2)] = 2


class LinearConfig(Section):
    """Linear evaluation of frozen features.

    Attributes:
        protocol: the paper's SGD on random views (`sgd`), or L-BFGS on features computed once (`cached`).
        epochs: epochs of `sgd`.
        global_batch_size: images per step of `sgd`.
        learning_rate: initial learning rate of `sgd`, with a cosine schedule.
        l2_penalties: penalties that `cached` compares on a tenth of the training images.
    """

    protocol: Literal["sgd", "cached"] = "sgd"
    epochs: PositiveInt = 100
    global_batch_size: PositiveInt = 2048
    learning_rate: PositiveFloat = 40.0
    l2_penalties: Annotated[tuple[NonNegativeFloat, ...], Field(min_length=1)] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


class EvaluationConfig(Section):
    """What is evaluated, and on which labelled images: `data` lists what differs from the experiment's own `data`.

    Attributes:
        sources: what to evaluate: raw `pixels`, the `random` network, the `trained` one, a file of `weights`.
        checkpoint: checkpoint of `trained`: a step_… directory or a run directory; null: this run's newest.
        weights: file of `weights`: its library's keys, safetensors or torch.save; file.pth#prefix selects one network.
        batch_size: images per batch of one rank in a pass over features.
        data: other labelled images, listing what differs from `data`; null: those of `data`.
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
        source: backbone to export, as in `evaluation.sources`.
        formats: files to write: five formats of the backbone (`hub`: timm's local directory, which is the Hugging Face
            Hub's layout too), and `parquet` beside the .npy of features.
        images: folder of images whose features and embeddings are written; null: none.
    """

    source: Literal["random", "trained", "weights"] = "trained"
    formats: tuple[ExportFormat, ...] = ("pth", "safetensors", "hub", "detectron2", "onnx", "parquet")
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
                f"{unknown[0]!r} is not one of {', '.join(known)}: the first five are of the backbone, the last of the "
                "features of the folder that export.images names, which are written as .npy in any case"
            )
        return values
