"""Images that cannot be read when a data set is opened: found by their headers, then refused or excluded."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from instance_ssl.data.decode import open_image
from instance_ssl.errors import UserError, escape, reason

_HEADERS_PER_TASK = 256
_NAMED = 5


@dataclass(frozen=True)
class OnBroken:
    """What becomes of images that cannot be read.

    Attributes:
        skip: they are excluded; otherwise the first one is an error.
        max_share: of all images that may be excluded; more of them are an error that names some.
    """

    skip: bool = False
    max_share: float = 0.01

    def judge(self, broken: Sequence[tuple[str, str]], count: int) -> None:
        """Decides about images of which each is given by what a message calls it and what is wrong with it.

        Args:
            count: of all images, these included.

        Raises:
            UserError: for the first of them, or for more than the share.
        """
        if broken and not self.skip:
            where, why = broken[0]
            raise UserError(f"cannot read image {where}: {why}; repair or remove it, or set data.on_broken to skip")
        if len(broken) > self.max_share * count:
            named = "; ".join(f"{where} ({why})" for where, why in broken[:_NAMED])
            more = f"; and {len(broken) - _NAMED} more" if len(broken) > _NAMED else ""
            raise UserError(
                f"{len(broken)} of {count} images cannot be read, more than data.max_broken_share "
                f"{self.max_share:g} allows: {named}{more}"
            )


REFUSE = OnBroken()


def check_files(root: Path, names: Sequence[str], on_broken: OnBroken) -> tuple[np.ndarray, dict[int, str]]:
    """Reads every file's header: sizes in bytes (N,) int64, and of each file that cannot be read, what is wrong.

    Raises:
        UserError: where `on_broken` does not let it pass.
    """

    def check(start: int) -> tuple[list[int], dict[int, str]]:
        sizes, problems = [], {}
        for index, name in enumerate(names[start : start + _HEADERS_PER_TASK], start):
            size, problem = _check_file(root / name)
            sizes.append(size)
            if problem is not None:
                problems[index] = problem
                if not on_broken.skip:
                    on_broken.judge([(escape(str(root / name)), problem)], len(names))
        return sizes, problems

    sizes_N = np.empty(len(names), np.int64)
    problems: dict[int, str] = {}
    with ThreadPoolExecutor() as pool:
        starts = range(0, len(names), _HEADERS_PER_TASK)
        for start, (sizes, found) in zip(starts, pool.map(check, starts), strict=True):
            sizes_N[start : start + len(sizes)] = sizes
            problems |= found
    on_broken.judge([(escape(str(root / names[index])), why) for index, why in problems.items()], len(names))
    return sizes_N, problems


def _check_file(path: Path) -> tuple[int, str | None]:
    try:
        size = path.stat().st_size
        if size == 0:
            return 0, "the file is empty"
        with open_image(path):
            return size, None
    except Exception as error:  # PIL's parsers raise OSError, SyntaxError, ValueError, struct.error and more
        return 0, reason(error)
