from collections import OrderedDict

import torch
from torch import nn


def tanh(in_features, num_classes, seed):
    """Build a network of one hidden layer."""
    torch.manual_seed(seed)
    layers = {"flat": nn.Flatten(), "hidden": nn.Linear(in_features, 8), "act": nn.Tanh()}
    return nn.Sequential(OrderedDict(layers, head=nn.Linear(8, num_classes)))
