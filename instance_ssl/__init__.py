"""Unsupervised visual representation learning with a one-million-way instance classifier (Liu et al., AAAI 2021).

Public names are imported when they are first used, and torch with them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from instance_ssl.classifier.instance_classifier import InstanceClassifier

__all__ = ["InstanceClassifier"]

_MODULES = {"InstanceClassifier": "instance_ssl.classifier.instance_classifier"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
