"""FedJAX: its federated averaging over its jit backend, on networks written in JAX with the weights of torch's."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib.metadata import version

# before JAX is imported: as many threads as the other runners have, in XLA's pools and in Eigen's products
os.environ["NPROC"] = os.environ.get("OMP_NUM_THREADS", "1")
os.environ["XLA_FLAGS"] = f"--xla_cpu_multi_thread_eigen={str(os.environ['NPROC'] != '1').lower()}"

import fedjax
import jax
import numpy as np
import torch
from fedjax.algorithms.fed_avg import federated_averaging
from jax import lax
from jax import numpy as jnp
from torch import Tensor, nn

from fedsparse.bench.alone import main
from fedsparse.bench.loop import flat
from fedsparse.bench.pairs import Feed, Trained
from fedsparse.bench.problems import CLIENTS, LR, MOMENTUM, Task

jax.config.update("jax_cpu_enable_async_dispatch", False)  # a step dispatched ahead computes beside Python's thread

Params = dict[str, jax.Array]  # by torch's names
Batch = dict[str, np.ndarray]


class ClientDataset(fedjax.ClientDataset):
    """A client's batches as they are given."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.batches: list[Batch] = [{"x": x.numpy(), "y": y.numpy()} for x, y in batches]
        super().__init__(self.batches[0])

    def __len__(self) -> int:
        """Count samples."""
        return sum(len(batch["y"]) for batch in self.batches)

    def shuffle_repeat_batch(self, hparams: fedjax.ShuffleRepeatBatchHParams) -> list[Batch]:
        """Local steps."""
        return self.batches


def _conv(conv: nn.Conv2d, params: Params, name: str, x: jax.Array) -> jax.Array:
    padding = [(p, p) for p in conv.padding]
    dimensions = ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(x, params[f"{name}.weight"], conv.stride, padding, dimension_numbers=dimensions)
    return y + params[f"{name}.bias"]


def _flatten(flatten: nn.Flatten, params: Params, name: str, x: jax.Array) -> jax.Array:
    return x.transpose(0, 3, 1, 2).reshape(len(x), -1)  # in torch's order


LAYERS: dict[type[nn.Module], Callable[..., jax.Array]] = {
    nn.Conv2d: _conv,
    nn.Linear: lambda _, params, name, x: x @ params[f"{name}.weight"] + params[f"{name}.bias"],
    nn.ReLU: lambda _, params, name, x: jax.nn.relu(x),
    nn.AdaptiveAvgPool2d: lambda _, params, name, x: x.mean((1, 2), keepdims=True),  # to one value, as in ``conv``
    nn.Flatten: _flatten,
}


def _gradient(net: nn.Module) -> Callable[[Params, Batch, jax.Array], Params]:
    """Build the gradient of the mean cross-entropy of a network that applies its layers in turn.

    Raises:
        ValueError: it has a layer that is not written in JAX here.

    """
    layers = list(net.named_children())
    if missing := sorted({type(layer).__name__ for _, layer in layers} - {kind.__name__ for kind in LAYERS}):
        raise ValueError(f"not written in JAX: {', '.join(missing)}")

    def loss(params: Params, batch: Batch, key: jax.Array) -> jax.Array:
        x = batch["x"].transpose(0, 2, 3, 1)
        for name, layer in layers:
            x = LAYERS[type(layer)](layer, params, name, x)
        return -jnp.take_along_axis(jax.nn.log_softmax(x), batch["y"][:, None], axis=1).mean()

    return jax.grad(loss)


def _to_jax(weights: Tensor) -> jax.Array:
    """Take a parameter in JAX's layout: (in, out) of a dense layer, (H, W, in, out) of a convolution."""
    return jnp.array(weights.detach().permute(_reversed(weights.ndim)).numpy())


def _to_torch(weights: jax.Array) -> Tensor:
    """Take a parameter in torch's layout."""
    back = np.argsort(_reversed(weights.ndim))
    return torch.from_numpy(np.array(weights).transpose(back))


def _reversed(ndim: int) -> tuple[int, ...]:
    """Axes of torch's layout in the order of JAX's: outputs last, inputs before them."""
    return (*range(2, ndim), 1, 0) if ndim > 1 else (0,)


def train(task: Task, feed: Feed) -> Trained:
    """Run FederatedAveraging; all is in one process and nothing is serialised."""
    net, hparams = task.net(), fedjax.ShuffleRepeatBatchHParams(task.problem.batch)
    local, server = fedjax.optimizers.sgd(LR, MOMENTUM), fedjax.optimizers.sgd(1.0)
    algorithm = federated_averaging(_gradient(net), local, server, hparams)
    state = algorithm.init({name: _to_jax(p) for name, p in net.named_parameters()})
    keys = jax.random.split(jax.random.PRNGKey(0), CLIENTS)
    for _ in range(task.rounds):
        feed.tick()
        clients = [(i, ClientDataset(batches), keys[i]) for i, batches in enumerate(feed.batches)]
        state, _ = algorithm.apply(state, clients)
        jax.block_until_ready(state)  # the round ends with its result
    return Trained(flat([_to_torch(state.params[name]) for name, _ in net.named_parameters()]))


if __name__ == "__main__":
    main(train, sys.argv[1:], version("fedjax"))
