"""Unsupervised visual representation learning with a one-million-way instance classifier (Liu et al., AAAI 2021).

Public names are imported when they are first used, and torch with them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from instance_ssl.api import RunError, embed, export, pretrain
    from instance_ssl.classifier.instance_classifier import InstanceClassifier
    from instance_ssl.errors import UserError

__all__ = ["InstanceClassifier", "RunError", "UserError", "embed", "export", "pretrain"]

_MODULES = {
    "InstanceClassifier": "instance_ssl.classifier.instance_classifier",
    "UserError": "instance_ssl.errors",
    **dict.fromkeys(("RunError", "embed", "export", "pretrain"), "instance_ssl.api"),
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
