"""Which images of a tar shard are taken and which .cls is the label of which: joined by name over the whole shard.

A stem is a name up to its last dot, folder included. The label of `a.b.jpg` is `a.b.cls`, or else `a.cls`: WebDataset's
samples go up to the first dot. In the same way `a.seg.png` belongs to the sample of `a.jpg`, whose image that one is.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from instance_ssl.data.folders import escape

NO_LABEL = -1


@dataclass(frozen=True)
class Remark:
    """Something that the user should know of `count` members; `example` is the first of them, escaped."""

    count: int = 0
    example: str = ""


@dataclass(frozen=True)
class JoinedSamples:
    """What is taken of a shard.

    Attributes:
        places: of the images taken, ascending.
        labels: of each; -1 where it has none.
        unmatched: .cls members that no image has.
        further: images beside the one of their sample (`a.seg.png` and `a.jpg`), which are not taken.
        alike: images of one sample of which none has its very name (`a.jpg` and `a.png`), which are all taken.
    """

    places: list[int]
    labels: list[int]
    unmatched: Remark
    further: Remark
    alike: Remark


class Samples:
    """Collects the stems of images and labels, archive by archive where `cat` has joined several to one shard."""

    def __init__(self) -> None:
        self._stems: list[str] = []
        self._archive_of: list[int] = []
        self._labels: list[dict[str, int]] = []
        self._images: set[tuple[int, str]] = set()

    def begin_archive(self) -> None:
        """All that comes now lies in another archive: names may come again."""
        self._labels.append({})

    def add_image(self, stem: str) -> None:
        """Adds the next image; its place is the number of those before it."""
        self._stems.append(stem)
        self._archive_of.append(len(self._labels) - 1)

    def add_label(self, stem: str, label: int) -> bool:
        """Adds a label; whether the stem had none in this archive."""
        labels = self._labels[-1]
        is_first = stem not in labels
        labels.setdefault(stem, label)
        return is_first

    def join(self, names: Sequence[str]) -> JoinedSamples:
        """Decides who has which label; `names` are those of the images, for the remarks.

        Raises:
            ValueError: an image has none in its own archive and several in others.
        """
        if len(self._labels) > 1:
            self._images = set(zip(self._archive_of, self._stems, strict=True))
        first_with = {stem: place for place, stem in reversed(list(enumerate(self._stems)))}
        first_of: dict[tuple[int, str], int] = {}
        places, labels, further, alike = [], [], [], []
        used: set[tuple[int, str]] = set()
        for place, stem in enumerate(self._stems):
            key = self._find_label(place)
            shorter = [beginning for beginning in _beginnings(stem) if beginning != stem]
            if key is None or key[1] != stem:
                owner = next((first_with[beginning] for beginning in shorter if beginning in first_with), None)
                if owner is not None:
                    further.append((place, owner))
                    continue
            if key is not None:
                used.add(key)
            places.append(place)
            labels.append(NO_LABEL if key is None else self._labels[key[0]][key[1]])
            sample = key or (self._archive_of[place], [stem, *shorter][-1])
            if (first := first_of.setdefault(sample, place)) != place:
                alike.append((place, first))
        return JoinedSamples(
            places,
            labels,
            self._unmatched(used),
            _remark(names, further, "beside"),
            _remark(names, alike, "and"),
        )

    def _find_label(self, place: int) -> tuple[int, str] | None:
        """Archive and stem of an image's label: of the longest beginning that has one, in its own archive if there.

        A label of another archive is taken where that archive has no image of its own for it.
        """
        own = self._archive_of[place]
        for stem in _beginnings(self._stems[place]):
            if stem in self._labels[own]:
                return own, stem
            others = [n for n, labels in enumerate(self._labels) if stem in labels and (n, stem) not in self._images]
            if len(others) > 1:
                raise ValueError(f"holds {escape(stem)}.cls {len(others)} times: a sample has one label")
            if others:
                return others[0], stem
        return None

    def _unmatched(self, used: set[tuple[int, str]]) -> Remark:
        count = sum(map(len, self._labels)) - len(used)
        keys = ((archive, stem) for archive, labels in enumerate(self._labels) for stem in labels)
        return Remark(count, f"{escape(next(key for key in keys if key not in used)[1])}.cls") if count else Remark()


def _beginnings(stem: str) -> Iterator[str]:
    """The stem, then what comes before each dot of its last part, the longest first."""
    yield stem
    start = stem.rfind("/") + 1
    while (dot := stem.rfind(".", start + 1)) > 0:
        stem = stem[:dot]
        yield stem


def _remark(names: Sequence[str], pairs: list[tuple[int, int]], word: str) -> Remark:
    if not pairs:
        return Remark()
    first, other = (escape(names[place]) for place in pairs[0])
    return Remark(len(pairs), f"{first} {word} {other}")
