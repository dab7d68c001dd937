"""CaCo: pre-train an image encoder without labels by cooperative-adversarial contrastive learning.

    import caco
    caco.pretrain(data="photos/", out="runs/first", epochs=100)
    caco.knn("runs/first", data="labelled/train", val="labelled/val")

Options are those of the command line: `bank_size=4096`, groups as dictionaries: `views={"size": 64}`. Everything heavy is
imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from caco.api import embed, export, knn, linear, load_backbone, load_weights, pretrain, report
    from caco.bank import Bank
    from caco.loss import cooperative_adversarial_loss
    from caco.model import CaCo

__all__ = [
    "Bank",
    "CaCo",
    "cooperative_adversarial_loss",
    "embed",
    "export",
    "knn",
    "linear",
    "load_backbone",
    "load_weights",
    "pretrain",
    "report",
]

_HOMES = {"Bank": "caco.bank", "CaCo": "caco.model", "cooperative_adversarial_loss": "caco.loss"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'caco' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES.get(name, "caco.api")), name)


def __dir__() -> list[str]:
    return sorted(__all__)
