"""Optimizers: masked ones for clients, and the server's; independent of the federation."""

from fedsparse.optim.adam import SparseAdam
from fedsparse.optim.fedopt import AveragedMomentum, FedAdagrad, FedAdam, FedYogi
from fedsparse.optim.sgdm import SparseSGDM

__all__ = ["AveragedMomentum", "FedAdagrad", "FedAdam", "FedYogi", "SparseAdam", "SparseSGDM"]
