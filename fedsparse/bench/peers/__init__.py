"""The peers, each run by the Python of an environment of its own; fedsparse itself imports none of these modules."""

from __future__ import annotations

PEERS = {name: f"fedsparse.bench.peers.{name}" for name in ("pfl", "flwr", "fedlab", "fedjax")}
ONLY = {"fedjax": ("mlp", "conv", "conv_digits", "mlp_large")}  # their layers are written in JAX; other peers run all
