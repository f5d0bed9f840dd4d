"""A client: the local training of K clients as rows, without Lightning, data module or server."""

from fedsparse.federation.client.buffers import Buffers
from fedsparse.federation.client.drift import FedProx, Objective, Plain, Scaffold

__all__ = ["Buffers", "FedProx", "Objective", "Plain", "Scaffold"]
