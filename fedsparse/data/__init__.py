"""Data of a federation: data sets, partitions, rounds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedsparse.core.lazy import lazily

__all__ = ["Cohort", "Dataset", "FederatedDataModule", "LocalWork", "RoundPlan", "Split", "from_torch"]

if TYPE_CHECKING:
    from fedsparse.data.datamodule import FederatedDataModule
    from fedsparse.data.datasets import Dataset, Split
    from fedsparse.data.rounds import Cohort, LocalWork, RoundPlan
    from fedsparse.data.torch_sets import from_torch
else:  # a partition needs no Lightning
    _HOMES = {
        "Cohort": "fedsparse.data.rounds",
        "Dataset": "fedsparse.data.datasets",
        "FederatedDataModule": "fedsparse.data.datamodule",
        "LocalWork": "fedsparse.data.rounds",
        "RoundPlan": "fedsparse.data.rounds",
        "Split": "fedsparse.data.datasets",
        "from_torch": "fedsparse.data.torch_sets",
    }
    __getattr__, __dir__ = lazily(__name__, _HOMES)
