"""The record of a packed set: a folder of tar shards of images that runners/pack_dataset.py has written."""

from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from instance_ssl.data.folders import escape
from instance_ssl.errors import UserError, reason
from instance_ssl.files.structured import read_json

RECORD, BEGUN = "index.json", "packing.json"
_FORMAT = "instance_ssl packed images, version 1"


@dataclass(frozen=True)
class PackedSet:
    """What is in a packed set, and of what and how it was made.

    Attributes:
        shards: name and SHA-256 of each shard, in order.
        digest: SHA-256 of the shards' digests, in order.
        num_images: in all shards.
        class_names: of the labels; None where there are none.
        source: digest of the images it was made from.
        size: length of the short side in pixels, where the image was not smaller; 0: the files' own bytes.
        quality: of the JPEGs.
        left_out: images that could not be read.
    """

    shards: dict[str, str]
    digest: str
    num_images: int
    class_names: list[str] | None
    source: str
    size: int
    quality: int
    left_out: int

    def to_json(self) -> dict[str, object]:
        """What the file holds."""
        return {"format": _FORMAT, **asdict(self)}


def read_packed_set(folder: Path) -> PackedSet | None:
    """The record of a folder; None where it is no packed set.

    Raises:
        UserError: the packing was not finished, or the record is damaged.
    """
    path = folder / RECORD
    shown = f"data.root: {escape(str(folder))}"
    try:
        content = read_json(path)
    except FileNotFoundError:
        if (folder / BEGUN).exists():
            raise UserError(f"{shown} is packed in part only: run runners/pack_dataset.py again, it goes on") from None
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{shown}: {RECORD} cannot be read ({reason(error)}): pack the images again") from error
    if content.pop("format", None) != _FORMAT:
        return None  # somebody else's
    try:
        return TypeAdapter(PackedSet).validate_python(content)
    except ValidationError as error:
        wrong = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(f"{shown}: {RECORD} is damaged ({escape(wrong)}): pack the images again") from error
