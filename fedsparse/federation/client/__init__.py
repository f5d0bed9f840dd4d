"""The clients: local training of K clients as rows, without Lightning, data module or server."""

from fedsparse.federation.client.buffers import Buffers
from fedsparse.federation.client.drift import DriftCorrection, FedProx, NoCorrection, Scaffold

Objective, Plain = DriftCorrection, NoCorrection  # names of earlier versions, in stored configurations

__all__ = ["Buffers", "DriftCorrection", "FedProx", "NoCorrection", "Objective", "Plain", "Scaffold"]
