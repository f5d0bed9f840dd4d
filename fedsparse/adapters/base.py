"""The network beside which adapters stand: its fingerprint, and where it differs from the one that was built.

Shapes: P coordinates of the space.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from fedsparse.core.space import ParamSpace
from fedsparse.models.lora import Adapter

TASKS = {"ForCausalLM": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS"}  # ends of classes' names, PEFT's words


def digest(tensor: Tensor) -> str:
    """Hash shape, dtype and bytes of a tensor by SHA-256."""
    found = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype} ".encode())
    flat = tensor.detach().cpu().contiguous().flatten()
    found.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return found.hexdigest()


def hosted(net: nn.Module) -> tuple[str, nn.Module, str | None]:
    """Find the module that PEFT's ``from_pretrained`` is given: transformers' model inside a network, else the network.

    Returns:
        The beginning of its parameters' names, such as ``net.``, the module, and where transformers loaded it from.

    """
    from transformers import PreTrainedModel

    for name, module in net.named_modules():
        start = f"{name}." if name else ""
        if isinstance(module, PreTrainedModel) and all(key.startswith(start) for key in net.state_dict()):
            return start, module, module.name_or_path or None
    return "", net, None


@dataclass(frozen=True)
class Base:
    """The network without adapters, as its builder made it.

    Attributes:
        start: beginning of the names of the hosted module's parameters; see ``hosted``.
        kind: name of that module's class.
        name: where transformers loaded it from; None of another network.
        layers: that have an adapter.
        digests: of its tensors, by their names without adapters.

    """

    start: str
    kind: str
    name: str | None
    layers: tuple[str, ...]
    digests: Mapping[str, str] = field(repr=False)

    @classmethod
    def of(cls, net: nn.Module, adapters: Mapping[str, Adapter]) -> Base:
        """Describe a network as built, with adapters by layer; nothing is loaded into it yet."""
        start, module, name = hosted(net)
        factors = {factor for adapter in adapters.values() for factor in (adapter.down, adapter.up)}
        bare = cls(start, type(module).__name__, name, tuple(adapters), {})
        tensors = {key: tensor for key, tensor in net.state_dict().items() if key not in factors}
        return replace(bare, digests={bare.plain(key): digest(tensor) for key, tensor in tensors.items()})

    @property
    def task(self) -> str | None:
        """PEFT's word for the task; None if the class does not say it."""
        return next((task for end, task in TASKS.items() if self.kind.endswith(end)), None)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all tensors' names and digests."""
        lines = "\n".join(f"{name} {self.digests[name]}" for name in sorted(self.digests))
        return hashlib.sha256(lines.encode()).hexdigest()

    def plain(self, name: str) -> str:
        """Name a parameter as it is called without adapters.

        >>> Base("", "Net", None, ("blocks.0.q",), {}).plain("blocks.0.q.base_layer.weight")
        'blocks.0.q.weight'
        """
        layer, found, leaf = name.rpartition(".base_layer.")
        return f"{layer}.{leaf}" if found and layer in self.layers else name

    def within(self, name: str) -> str:
        """Name a parameter or layer as the hosted module calls it, without adapters."""
        return self.plain(name).removeprefix(self.start)


class Network:
    """A network whose adapters, head and changed frozen weights are replaced, again and again.

    Args:
        net: as built.
        space: what trains.

    Attributes:
        originals: frozen tensors as they were built, of those that were changed.

    """

    def __init__(self, net: nn.Module, space: ParamSpace) -> None:
        self.net, self.space = net.eval(), space
        self.originals: dict[str, Tensor] = {}

    @torch.no_grad()
    def load(self, row: Tensor, changed: Mapping[str, Tensor]) -> nn.Module:
        """Load a row (P,), and frozen tensors that differ from those that were built; the others are as built."""
        own = self.net.state_dict()
        for name in changed:
            self.originals.setdefault(name, own[name].clone())
        for name, tensor in {**self.originals, **changed}.items():
            own[name].copy_(tensor)
        self.space.write(self.net, row)
        return self.net
