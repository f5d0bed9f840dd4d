"""Partitions of AutoFLIP's command line, with the contract of ``fedsparse.data.partition``; and tests by user.

``patho`` has no function: ``conf/partition/patho.yaml`` is ``classes_per_client``.

Shapes: ``n`` samples, ``K`` clients.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedsparse.core.checks import finite
from fedsparse.data import checks, dealing, partition
from fedsparse.data.checks import Ints

_UNBALANCED = 110  # the next stream key after those of ``fedsparse.data.partition``


def unbalanced(labels: npt.ArrayLike, num_clients: int, seed: int, keep: Sequence[float] = (0.95, 0.99)) -> list[Ints]:
    """Deal all samples at random into even parts, of which each client keeps a share drawn from U(low, high).

    AutoFLIP's ``unbalanced``. Of a part of m samples floor(share * m) are kept, at least one; the others are unused.

    Args:
        labels: class of each sample (n,), or NO_CLASS of all; only their number matters.
        num_clients: number of clients K.
        seed: seed of the partition.
        keep: low and high of the shares, 0 < low <= high <= 1.

    Returns:
        K arrays of sorted sample indices.

    Raises:
        ValueError: ``keep`` is not two such numbers.

    >>> [len(part) for part in unbalanced([0] * 20, num_clients=2, seed=0, keep=(0.5, 0.5))]
    [5, 5]

    """
    low, high = _checked_keep(keep)
    rng = dealing.stream(seed, _UNBALANCED)
    parts = partition.iid(labels, num_clients, seed)
    shares = rng.uniform(low, high, len(parts))
    # nudged: 0.29 * 100 is 28.999999999999996 in floats
    sizes = [max(1, int(share * len(part) + 1e-9)) for share, part in zip(shares.tolist(), parts, strict=True)]
    return [np.sort(rng.choice(part, size, replace=False)) for part, size in zip(parts, sizes, strict=True)]


def diri(labels: npt.ArrayLike, num_clients: int, concentration: float, seed: int) -> list[Ints]:
    """Draw a class mix for every client; ``concentration`` is that of one class, as AutoFLIP's ``cncntrtn``.

    This is ``dirichlet_client`` with ``beta`` = concentration x C: of C classes of equal size every client's mix is
    Dir(c, ..., c), as AutoFLIP draws it; of others the mix is centred on that of the data, as Hsu et al. 2019 have it.
    AutoFLIP draws a client's mix again, and shrinks its part, when a class runs out, and drops what is left.

    Args:
        labels: class of each sample (n,).
        num_clients: number of clients K.
        concentration: above 0; small is one class a client, large is the mix of the data.
        seed: seed of the partition.

    Returns:
        K arrays of sorted sample indices.

    Raises:
        ValueError: ``concentration`` is not finite and above 0.

    """
    classes = np.unique(checks.checked_labels(labels)).size
    beta = checks.checked_positive("partition.concentration", concentration) * classes
    return partition.dirichlet_client(labels, num_clients, beta, seed)


def user_tests(train_users: npt.ArrayLike, test_users: npt.ArrayLike) -> list[Ints]:
    """Assign test samples to the users of the training split, in the order of ``natural``.

    A user without test samples gets none; test samples of other users are unused.

    Args:
        train_users: user id of each training sample.
        test_users: user id of each test sample.

    Returns:
        One array of sorted indices into the test split for every user who trains.

    >>> [part.tolist() for part in user_tests(["b", "a", "b", "c"], ["c", "b", "x", "b"])]
    [[], [1, 3], [0]]

    """
    names, ids = np.unique(np.asarray(train_users)), np.asarray(test_users)
    place = np.minimum(np.searchsorted(names, ids), names.size - 1)
    return dealing.parts_of(np.where(names[place] == ids, place, dealing.NOBODY), names.size)


def _checked_keep(keep: Sequence[float]) -> tuple[float, float]:
    """Return low and high."""
    values = list(keep) if isinstance(keep, Sequence) and not isinstance(keep, str) else []
    real = [v for v in values if finite(v)]
    if len(values) != 2 or len(real) != 2 or not 0 < real[0] <= real[1] <= 1:
        raise ValueError(f"partition.keep is {keep!r}; give two shares [low, high], above 0 and at most 1, low first")
    return float(real[0]), float(real[1])
