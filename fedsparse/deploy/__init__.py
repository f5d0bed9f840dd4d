"""Out of the simulator: the same clients and server on real machines, with bytes between them."""
