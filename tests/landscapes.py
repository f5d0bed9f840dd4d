"""Landscapes of a small run, and its models by hand."""

from __future__ import annotations

import numpy as np
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from fedsparse.landscape.drawing import landscape
from fedsparse.landscape.options import Options
from fedsparse.models.vision import mlp

FEW = {"grid": "grid=3", "curvature": "curvature=false"}


def drawn(folder, *typed):
    few = [word for key, word in FEW.items() if not any(one.startswith(f"{key}=") for one in typed)]
    figures, _ = landscape(folder, Options.read([*few, *typed]))
    return figures


def surface(folder, data="test"):
    with np.load(folder / "landscape" / f"surface_{data}.npz") as file:
        return {name: file[name] for name in file.files}


def net_of(row):
    net = mlp(64, 64, 10, seed=1)
    torch.nn.utils.vector_to_parameters(row, net.parameters())
    return net


@torch.no_grad()
def by_hand(row, x, y):
    logits = net_of(row)(x)
    return float(cross_entropy(logits.double(), y)), float((logits.argmax(1) == y).double().mean())


def global_row(folder):
    tensors = load_file(folder / "model.safetensors")
    return torch.cat([tensors[name].flatten() for name, _ in mlp(64, 64, 10, seed=0).named_parameters()])
