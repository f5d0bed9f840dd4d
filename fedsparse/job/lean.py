"""Imports torchmetrics, which Lightning imports whole, without what it loads for metrics that no run computes."""

from __future__ import annotations

from fedsparse.core.absent import absent

# where they are installed, torchmetrics imports them for metrics of texts and sounds, and for plots
OPTIONAL = ("matplotlib", "scipy", "transformers")


def import_torchmetrics() -> None:
    """Import torchmetrics in two seconds less; what needs one of ``OPTIONAL`` is missing from it in this process.

    So this is for a command without code of one's own, which could use those metrics.
    """
    import torchvision  # noqa: F401  first, so that torchmetrics alone finds the packages absent
    from lightning_utilities.core.imports import package_available

    with absent(*OPTIONAL):
        import torchmetrics  # noqa: F401
    package_available.cache_clear()  # it has kept that scipy is absent
