import torch
from torch.utils.data import TensorDataset


def bright_columns():
    """Make images of 4 x 4 whose class is their brightest column."""
    x = torch.randn(300, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, x.sum((1, 2)).argmax(1))
