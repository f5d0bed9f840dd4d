"""A network that carries the weights of K clients.

Their batches lie one behind the other, and only layers that have weights tell them apart. Attention, activations and
pooling run as they are, without ``vmap``.

Shapes: K clients, B samples of each, O outputs, I inputs, C channels; x is (K * B, ...) throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fedsparse.models.units import stacked_linear

Weights = Mapping[str, Tensor]
CACHE = 1 << 21  # bytes of images that a convolution of all clients may read on a CPU
TOLERANCE = 1e-3  # of the largest output, between a stacked forward and one client's own


def _linear(layer: nn.Linear, weights: Weights, x: Tensor, units: Tensor | None = None) -> Tensor:
    """Multiply by weights (K, O, I) and add biases (K, O) in one batched matrix product."""
    weight = weights["weight"]
    rows = x.reshape(len(weight), -1, x.shape[-1])
    return stacked_linear(rows, weight, weights.get("bias"), units).view(*x.shape[:-1], -1)


def _conv2d(layer: nn.Conv2d, weights: Weights, x: Tensor) -> Tensor:
    """Convolve by weights (K, O, C, h, w), in one convolution with a group of channels for each client.

    On a CPU only where the images fit in its cache; else one client after the other, whose own images do.
    """
    weight, bias = weights["weight"], weights.get("bias")
    clients, convolve = len(weight), partial(_convolve, layer)
    rows = x.unflatten(0, (clients, -1))
    if x.device.type == "cpu" and x.nbytes > CACHE:
        biases = [None] * clients if bias is None else bias
        singles = zip(rows, weight, biases, strict=True)
        return torch.cat([convolve(row, w, b, layer.groups) for row, w, b in singles])
    wide = rows.transpose(0, 1).flatten(1, 2)  # (B, K * C, H, W)
    flat = None if bias is None else bias.flatten()
    out = convolve(wide, weight.flatten(0, 1), flat, clients * layer.groups)
    return out.unflatten(1, (clients, -1)).transpose(0, 1).flatten(0, 1)


def _convolve(layer: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """Convolve as the layer does, by other weights."""
    return F.conv2d(x, weight, bias, stride=layer.stride, padding=layer.padding, dilation=layer.dilation, groups=groups)


def _layer_norm(layer: nn.LayerNorm, weights: Weights, x: Tensor) -> Tensor:
    """Normalise, then scale by (K, *shape)."""
    normal = F.layer_norm(x, layer.normalized_shape, eps=layer.eps)
    return _scaled(normal, weights, x.dim() - len(layer.normalized_shape) - 1)


def _group_norm(layer: nn.GroupNorm, weights: Weights, x: Tensor) -> Tensor:
    """Normalise, then scale the channels by (K, C)."""
    normal = F.group_norm(x, layer.num_groups, eps=layer.eps)
    spread = {name: value.view(*value.shape, *[1] * (x.dim() - 2)) for name, value in weights.items()}
    return _scaled(normal, spread, 0)


def _scaled(x: Tensor, weights: Weights, between: int) -> Tensor:
    """Multiply x by each client's weight and add its bias, with so many dimensions between sample and weight."""
    if not weights:
        return x
    weight, bias = weights["weight"], weights.get("bias")
    shape = (len(weight), 1, *[1] * between, *weight.shape[1:])
    rows = x.unflatten(0, (len(weight), -1))
    out = rows * weight.view(shape) if bias is None else torch.addcmul(bias.view(shape), rows, weight.view(shape))
    return out.flatten(0, 1)


LAYERS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv2d,
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
}


class Stacked:
    """A network's forward under K sets of weights.

    The network itself is changed for the time of a call only: its own weights stay those of the global model.

    Args:
        net: the network.
        tensors: weights (K, *shape) by parameter name; a parameter that is not among them is the same for all.
        forward: calls the network, if not the network itself does.
        units: int64 (u,), the output units that train, by the name of a linear layer's weight; else all do.

    Raises:
        ValueError: a weight sits where no stacked form is known; names it.

    """

    def __init__(
        self,
        net: nn.Module,
        tensors: Weights,
        forward: Callable[[Tensor], Tensor] | None = None,
        units: Weights | None = None,
    ) -> None:
        self.forward = net if forward is None else forward
        self.clients = len(next(iter(tensors.values())))
        own = dict(net.named_parameters())
        _refuse_tied(net, tensors)
        self.layers: list[tuple[nn.Module, Callable[..., Tensor]]] = []
        self.bare: list[tuple[nn.Module, str, Tensor]] = []
        for prefix, module in net.named_modules():
            names = {name: f"{prefix}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=False)}
            if not tensors.keys() & set(names.values()):
                continue
            weights = {name: tensors.get(full, self._same(own[full])) for name, full in names.items()}
            form, trained = _form(module), (units or {}).get(f"{prefix}.weight")
            if form is not None and trained is not None:
                self.layers.append((module, partial(form, module, weights, units=trained)))
            elif form is not None:
                self.layers.append((module, partial(form, module, weights)))
            else:
                self.bare += [(module, name, _leading_one(names[name], value)) for name, value in weights.items()]

    def _same(self, value: Tensor) -> Tensor:
        return value.detach().expand(self.clients, *value.shape)

    def __call__(self, x: Tensor) -> Tensor:
        """Run x (K * B, ...), the clients' batches one behind the other."""
        samples = len(x) // self.clients
        for module, forward in self.layers:
            module.__dict__["forward"] = forward
        for module, name, value in self.bare:  # an attribute of the instance comes before the module's parameter
            module.__dict__[name] = value.expand(-1, samples, *value.shape[2:]).flatten(0, 1)
        try:
            return self.forward(x)
        finally:
            for module, _ in self.layers:
                del module.__dict__["forward"]
            for module, name, _ in self.bare:
                del module.__dict__[name]


def _form(module: nn.Module) -> Callable[..., Tensor] | None:
    """Stacked form of a layer; of a class or the nearest class it is derived from."""
    if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
        return None
    if not {name for name, _ in module.named_parameters(recurse=False)} <= {"weight", "bias"}:
        return None  # its weight is computed from others
    return next((LAYERS[kind] for kind in type(module).__mro__ if kind in LAYERS), None)


def _leading_one(name: str, value: Tensor) -> Tensor:
    """Accept weights (K, 1, ...) that are broadcast over samples, such as a class token."""
    if value.dim() < 3 or value.shape[1] != 1:
        raise ValueError(f"{name} belongs to a layer without a stacked form")
    return value


def _refuse_tied(net: nn.Module, tensors: Weights) -> None:
    """Refuse a weight that two layers share: it stands once, under its first name."""
    every = dict(net.named_parameters(remove_duplicate=False))
    once = {id(every[name]) for name in tensors}
    tied = [name for name, value in every.items() if id(value) in once and name not in tensors]
    if tied:
        raise ValueError(f"{tied[0]} is tied to another weight")


@torch.no_grad()
def stacks(net: nn.Module, names: Collection[str], x: Tensor) -> bool:
    """Whether the stacked forward gives what ``functional_call`` gives for each client: tried on weights that differ.

    A layer whose weight is used by other code than its own forward would take the global weights, without an error.

    Args:
        net: the network.
        names: of the federated tensors.
        x: a few samples (B, ...).

    """
    was = net.training
    net.eval()  # dropout differs between any two calls
    try:
        rows = {name: _two_apart(value) for name, value in net.named_parameters() if name in names}
        with torch.autocast(x.device.type, enabled=False):
            found = Stacked(net, rows)(torch.cat([x, x])).chunk(2)
            single = [functional_call(net, {name: row[k] for name, row in rows.items()}, (x.clone(),)) for k in (0, 1)]
        return all(_close(a, b) for a, b in zip(found, single, strict=True))
    except (ValueError, RuntimeError, TypeError, IndexError):
        return False  # what cannot be stacked so runs under vmap
    finally:
        net.train(was)


def _two_apart(value: Tensor) -> Tensor:
    """Weights of two clients, each moved by some noise: (2, *shape)."""
    g = torch.Generator().manual_seed(value.numel())
    noise = torch.randn(2, *value.shape, generator=g, dtype=value.dtype).to(value.device)
    spread = value.detach().std(correction=0).clamp(min=0.1) if value.numel() else 0.0
    return value.detach() + 0.05 * noise * spread


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= TOLERANCE * b.abs().max())
