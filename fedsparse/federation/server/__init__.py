"""The server: global rows, sampling of clients, and aggregation of updates."""

from fedsparse.federation.server.aggregation import Aggregation, Change, FedNova, Robust, WeightedMean
from fedsparse.federation.server.merging import Merging, Stacking
from fedsparse.federation.server.mixing import ClusterMixing, GlobalMixing, Mixing
from fedsparse.federation.server.robust import (
    coordinate_mean,
    geometric_median,
    krum,
    median,
    multi_krum,
    trimmed_mean,
    weighted_mean,
)
from fedsparse.federation.server.sampling import everyone, uniform
from fedsparse.federation.server.server import Server
from fedsparse.federation.server.topology import Departments, Flat, Topology

__all__ = [
    "Aggregation",
    "Change",
    "ClusterMixing",
    "Departments",
    "FedNova",
    "Flat",
    "GlobalMixing",
    "Merging",
    "Mixing",
    "Robust",
    "Server",
    "Stacking",
    "Topology",
    "WeightedMean",
    "coordinate_mean",
    "everyone",
    "geometric_median",
    "krum",
    "median",
    "multi_krum",
    "trimmed_mean",
    "uniform",
    "weighted_mean",
]
