import numpy as np


def blocks(labels, num_clients, seed):
    """Deal samples in the order in which they lie."""
    return np.array_split(np.arange(len(labels)), num_clients)
