"""Partitions of samples over clients, pure functions of labels, number of clients and seed.

Every function returns one int64 array a client, of sorted sample indices, and uses every sample exactly once unless its
docstring says otherwise. Equal arguments give equal parts. The classes are those that occur in the labels.

All of them raise ``ValueError`` when labels are not a 1-D array of non-negative integers, or, where only their number
matters, all ``checks.NO_CLASS``, when ``num_clients`` is not
an integer from 1 to the number of samples, or when ``seed`` is not an integer of at least 0.

Shapes: ``n`` samples, ``K`` clients, ``C`` classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedsparse.core.checks import check_flag
from fedsparse.data import checks, dealing
from fedsparse.data.checks import Floats, Ints
from fedsparse.data.even import holders_of_one_more

__all__ = [
    "classes_per_client",
    "client_tests",
    "dirichlet",
    "dirichlet_client",
    "dirichlet_sampled",
    "iid",
    "natural",
    "quantity",
    "ratios",
]

# Keys of random streams: never changed, since a seed's draws depend on them; disjoint from ``core.seeding.Purpose``.
_IID, _CLASSES, _DIRICHLET, _DIRICHLET_CLIENT, _QUANTITY, _RATIOS, _TESTS, _MIXES, _DRAWS = range(101, 110)
_VALIDATION = 114  # the next stream key after those of ``fedsparse.data.leaf``


def iid(labels: npt.ArrayLike, num_clients: int, seed: int) -> list[Ints]:
    """Deal all samples at random into parts whose sizes differ by at most one.

    Args:
        labels: class of each sample (n,), or NO_CLASS of all; only their number matters.
        num_clients: number of clients K.
        seed: seed of the partition.

    Returns:
        K arrays of sorted sample indices.

    >>> sorted(len(part) for part in iid([0, 1, 2, 0, 1, 2, 0], num_clients=3, seed=0))
    [2, 2, 3]

    """
    n = checks.checked_samples(labels)
    clients, rng = checks.checked_clients(num_clients, n), dealing.stream(seed, _IID)
    return dealing.parts_of(rng.permutation(np.arange(n) % clients), clients)


def classes_per_client(labels: npt.ArrayLike, num_clients: int, nc: int, seed: int, even: bool = True) -> list[Ints]:
    """Give every client exactly ``nc`` distinct classes; the shards of one class differ by at most one sample.

    Every class is held by floor or ceil of K * nc / C clients (the shards of McMahan et al. 2017, with exact numbers of
    classes). The remainder of a class goes to its smallest holders, so that clients' sizes differ by at most one where
    that is possible. When K * nc < C, some classes have no holder and their samples stay unused; a warning counts
    them.

    Args:
        labels: class of each sample (n,).
        num_clients: number of clients K.
        nc: classes of each client, at most C.
        seed: seed of the partition.
        even: whether the remainder of a class goes to its smallest holders; False: to the first holders drawn, as in
            older runs, which lack the key.

    Returns:
        K arrays of sorted sample indices.

    Raises:
        ValueError: ``nc`` is no integer from 1 to C, a class has fewer samples than holders, or ``even`` is no bool.

    >>> labels = np.array([0, 0, 0, 1, 1, 1])
    >>> [np.unique(labels[part]).size for part in classes_per_client(labels, num_clients=4, nc=1, seed=0)]
    [1, 1, 1, 1]

    """
    array = checks.checked_labels(labels)
    clients, rng = checks.checked_clients(num_clients, array.size), dealing.stream(seed, _CLASSES)
    names, coded = np.unique(array, return_inverse=True)
    if checks.checked_integer("partition.nc", nc, 1) > names.size:
        raise ValueError(f"partition.nc is {nc} but the data has {names.size} classes; give at most {names.size}")
    chosen = dealing.deal_classes(clients, names.size, nc, rng).reshape(-1)
    sizes, holders = np.bincount(coded), np.bincount(chosen, minlength=names.size)
    _check_holders(names, sizes, holders)
    check_flag("partition.even", even)
    return dealing.parts_of(_deal_shards(coded, chosen, nc, rng, even), clients)


def dirichlet(labels: npt.ArrayLike, num_clients: int, beta: float, seed: int, min_size: int = 1) -> list[Ints]:
    """Spread each class over the clients by shares drawn from Dir(beta, ..., beta).

    Yurochkin et al. 2019; Li et al. 2022 (NIID-Bench). They redraw until every client is large enough, which may not
    terminate; here clients below ``min_size`` are filled with random samples of the largest ones.

    Args:
        labels: class of each sample (n,).
        num_clients: number of clients K.
        beta: concentration, above 0; small is uneven, large is even.
        seed: seed of the partition.
        min_size: fewest samples of a client.

    Returns:
        K arrays of sorted sample indices.

    Raises:
        ValueError: ``beta`` is not finite and above 0, or the data is too small for ``min_size``.

    """
    array = checks.checked_labels(labels)
    clients, rng = checks.checked_clients(num_clients, array.size), dealing.stream(seed, _DIRICHLET)
    alpha = np.array(checks.checked_positive("partition.beta", beta))
    least = checks.checked_minimum(min_size, clients, array.size)
    sizes = np.unique(array, return_counts=True)[1]
    owner = np.empty(array.size, dtype=np.int64)
    owner[dealing.grouped(array, rng)] = np.concatenate([_spread(int(size), clients, alpha, rng) for size in sizes])
    return dealing.parts_of(dealing.fill_small(owner, clients, least, rng), clients)


def dirichlet_client(
    labels: npt.ArrayLike, num_clients: int, beta: float, seed: int, cells: int = dealing.CELLS
) -> list[Ints]:
    """Draw a class mix q ~ Dir(beta * p) for every client, with p the class mix of the data; equal sizes.

    Hsu et al. 2019. Clients draw in turn, without replacement; once a class is empty, the mix is renormalised over the
    other classes, so the last clients get the remaining samples. Sizes differ by at most one.

    Args:
        labels: class of each sample (n,).
        num_clients: number of clients K.
        beta: concentration, above 0; small is one class a client, large is the mix of the data.
        seed: seed of the partition.
        cells: clients x classes of one chunk of draws; results depend on it.

    Returns:
        K arrays of sorted sample indices.

    Raises:
        ValueError: ``beta`` is not finite and above 0.

    """
    array = checks.checked_labels(labels)
    clients, rng = checks.checked_clients(num_clients, array.size), dealing.stream(seed, _DIRICHLET_CLIENT)
    left = np.unique(array, return_counts=True)[1]
    alpha = checks.checked_positive("partition.beta", beta) * left / array.size
    wanted = array.size // clients + (np.arange(clients) < array.size % clients)
    order, entries = dealing.grouped(array, rng), []
    for rows in dealing.chunks(clients, left.size, cells):
        logs = dealing.dirichlet_logs(alpha, (rows.stop - rows.start, left.size), rng)
        counts = dealing.draw_mixes(logs, wanted[rows], left, rng)
        row, column = np.nonzero(counts)
        entries.append((row + rows.start, column, counts[row, column]))
    client, column, count = (np.concatenate(field) for field in zip(*entries, strict=True))
    first = np.argsort(column, kind="stable")
    owner = np.empty(array.size, dtype=np.int64)
    owner[order] = np.repeat(client[first], count[first])
    return dealing.parts_of(owner, clients)


def quantity(labels: npt.ArrayLike, num_clients: int, beta: float, seed: int, min_size: int = 1) -> list[Ints]:
    """Deal samples at random into parts whose sizes follow Dir(beta, ..., beta); labels are IID.

    Li et al. 2022 (NIID-Bench, quantity skew). Clients below ``min_size`` are filled from the largest ones.

    Args:
        labels: class of each sample (n,), or NO_CLASS of all; only their number matters.
        num_clients: number of clients K.
        beta: concentration, above 0; small is uneven, large is even.
        seed: seed of the partition.
        min_size: fewest samples of a client.

    Returns:
        K arrays of sorted sample indices.

    Raises:
        ValueError: ``beta`` is not finite and above 0, or the data is too small for ``min_size``.

    """
    n = checks.checked_samples(labels)
    clients, rng = checks.checked_clients(num_clients, n), dealing.stream(seed, _QUANTITY)
    alpha = np.array(checks.checked_positive("partition.beta", beta))
    least = checks.checked_minimum(min_size, clients, n)
    owner = rng.permutation(_spread(n, clients, alpha, rng))
    return dealing.parts_of(dealing.fill_small(owner, clients, least, rng), clients)


def ratios(
    labels: npt.ArrayLike,
    num_clients: int,
    class_ratios: Sequence[Sequence[float]] | None,
    fractions: Sequence[float] | float | None,
    seed: int,
) -> list[Ints]:
    """Draw for every client a share of the data with given class ratios, as in Fedland; clients may overlap.

    Client i gets floor(fractions[i] * n) samples, split over the classes by the largest remainder of its ratios (ties
    to the lowest class). No sample repeats within a client, and samples that no client drew stay unused.

    Args:
        labels: class of each sample (n,).
        num_clients: number of clients K.
        class_ratios: K rows of one non-negative number a class, from class 0 on; a row need not sum to 1.
        fractions: share of the data of every client, in (0, 1]: K numbers, or one for all.
        seed: seed of the partition.

    Returns:
        K arrays of sorted sample indices.

    Raises:
        ValueError: ratios or fractions are missing or of a wrong length, sign or size, or a class has fewer samples
            than a client asks for.

    """
    array = checks.checked_labels(labels)
    clients, rng = checks.checked_clients(num_clients, array.size), dealing.stream(seed, _RATIOS)
    weights = checks.checked_ratios(class_ratios, clients, int(array.max()) + 1)
    sizes = checks.checked_sizes(fractions, clients, array.size)
    wanted = dealing.largest_remainder(weights, sizes)
    room = np.bincount(array, minlength=weights.shape[1])
    _check_room(wanted, room)
    pools = np.split(np.argsort(array, kind="stable"), np.cumsum(room)[:-1])
    return [
        np.sort(np.concatenate([rng.choice(pool, k, replace=False) for pool, k in zip(pools, row, strict=True)]))
        for row in wanted
    ]


def natural(labels: npt.ArrayLike, num_clients: int, seed: int, users: npt.ArrayLike | None = None) -> list[Ints]:
    """Make every user of the data set a client, in the order of their sorted ids.

    Args:
        labels: class of each sample (n,), or NO_CLASS of all; only their number matters.
        num_clients: number of clients K, which must be the number of users.
        seed: seed of the partition; nothing is random here.
        users: user id of each sample (n,), integers or strings.

    Returns:
        K arrays of sorted sample indices.

    Raises:
        ValueError: there are no users, not one a sample, or not ``num_clients`` of them.

    >>> [part.tolist() for part in natural([0, 1, 0], num_clients=2, seed=0, users=["eve", "bob", "eve"])]
    [[1], [0, 2]]

    """
    n = checks.checked_samples(labels)
    checks.checked_integer("seed", seed, 0)
    if users is None:
        raise ValueError("partition=natural needs a user for every sample but the data set has no user column")
    ids = np.asarray(users)
    if ids.shape != (n,):
        raise ValueError(f"partition=natural needs one user for each of the {n} samples; users have shape {ids.shape}")
    names, owner = np.unique(ids, return_inverse=True)
    if checks.checked_integer("federation.num_clients", num_clients, 1) != names.size:
        raise ValueError(
            f"federation.num_clients is {num_clients} but the data has {names.size} users; "
            f"partition=natural needs federation.num_clients={names.size}"
        )
    return dealing.parts_of(owner.astype(np.int64), names.size)


def dirichlet_sampled(
    labels: npt.ArrayLike,
    num_clients: int,
    beta: float,
    sample_fraction: float,
    seed: int,
    test: bool = False,
) -> list[Ints]:
    """Draw with replacement for every client, by its class shares p ~ Dir(beta, ..., beta); clients overlap.

    As in FL4Health's AG News example, with a seed: of m = floor(sample_fraction * n) samples, ceil(p_c * m) are
    drawn of class c, class after class, and the list is cut to m. A client's shares are the same for training and for
    test labels. Samples may repeat within a client, and those that no client drew stay unused.

    Args:
        labels: class of each sample (n,).
        num_clients: number of clients K.
        beta: concentration, above 0; small is uneven, large is even.
        sample_fraction: share of the data of every client, in (0, 1].
        seed: seed of the partition.
        test: whether these are the labels of the test split, which has its own random stream.

    Returns:
        K arrays of sorted sample indices, m each.

    Raises:
        ValueError: ``beta`` or ``sample_fraction`` is out of range.

    """
    array = checks.checked_labels(labels)
    clients = checks.checked_integer("federation.num_clients", num_clients, 1)
    alpha = np.array(checks.checked_positive("partition.beta", beta))
    size = checks.checked_size("partition.sample_fraction", sample_fraction, array.size)
    order, room = np.argsort(array, kind="stable"), np.bincount(array)
    pools = [pool for pool in np.split(order, np.cumsum(room)[:-1]) if pool.size]
    parts = list[Ints]()
    for client in range(clients):
        shares = _own_mix(seed, client, alpha, room > 0)
        rng = dealing.stream(seed, _DRAWS, client, int(test))
        counts = np.minimum(np.ceil(shares * size).astype(np.int64), size)
        drawn = [rng.choice(pool, count) for pool, count in zip(pools, counts, strict=True)]
        parts.append(np.sort(np.concatenate(drawn)[:size]))
    return parts


def _own_mix(seed: int, client: int, alpha: Floats, present: npt.NDArray[np.bool_]) -> Floats:
    """Draw a client's shares of the present classes (C,), with the same weight of a class in every split.

    Each class draws from a stream keyed by its index, so that further classes do not change it.
    """
    logs = [
        dealing.dirichlet_logs(alpha, (), dealing.stream(seed, _MIXES, client, c))
        for c in np.flatnonzero(present).tolist()
    ]
    return dealing.softmax(np.array(logs))


def client_tests(
    train_parts: Sequence[Ints],
    train_labels: npt.ArrayLike,
    test_labels: npt.ArrayLike,
    seed: int,
    cells: int = dealing.CELLS,
    validation: bool = False,
) -> list[Ints]:
    """Deal every client a test part with the class mix of its training part.

    A client with n_i of the n training samples gets m_i = max(1, round(n_i * n_test / n)) test samples (none if n_i is
    0), split by the largest remainder of its training mix. Where the test set has too few of a class, the client
    gets more of its other classes; if they are too few, the part is smaller, and empty when the test set has none.
    Each class is dealt in turn from one shuffled pool, so clients share a test sample only when the pool is used up;
    no sample repeats within a client.

    Args:
        train_parts: training samples of each client, K arrays.
        train_labels: class of each training sample (n,).
        test_labels: class of each test sample (n_test,).
        seed: seed of the partition.
        cells: clients x classes of one chunk; results do not depend on it.
        validation: whether the labels are those of the validation split, which has its own random stream.

    Returns:
        K arrays of sorted indices into the test set.

    """
    train, test = checks.checked_labels(train_labels), checks.checked_labels(test_labels, "test labels")
    rng, classes = dealing.stream(seed, _VALIDATION if validation else _TESTS), 1 + int(max(train.max(), test.max()))
    room, pool = np.bincount(test, minlength=classes), dealing.grouped(test, rng)
    used, parts = np.zeros(classes, dtype=np.int64), list[Ints]()
    for rows in dealing.chunks(len(train_parts), classes, cells):
        mix = dealing.class_counts(train_parts[rows], train, classes)
        size = mix.sum(axis=1)
        wanted = np.maximum(np.rint(size * test.size / train.size), size > 0).astype(np.int64)
        counts = dealing.capped_split(mix, wanted, room)
        parts += dealing.deal_in_turn(counts, used, pool, room)
        used += counts.sum(axis=0)
    return parts


def _spread(size: int, clients: int, alpha: Floats, rng: np.random.Generator) -> Ints:
    """List the owners of ``size`` samples by shares of Dir(alpha), client 0 first: (size,)."""
    shares = dealing.softmax(dealing.dirichlet_logs(alpha, (clients,), rng))
    return np.repeat(np.arange(clients), dealing.rounded_shares(shares, size, rng))


def _deal_shards(labels: Ints, chosen: Ints, nc: int, rng: np.random.Generator, even: bool) -> Ints:
    """Deal the samples of each class in turn to its holders; ``chosen`` lists nc classes a client: owners (n,)."""
    sizes = np.bincount(labels)
    holders = np.bincount(chosen, minlength=sizes.size)
    slots, order = dealing.grouped(chosen, rng), dealing.grouped(labels, rng)
    first, among = np.repeat(dealing.starts_of(holders), sizes), np.repeat(holders, sizes)
    is_held = among > 0
    rank = dealing.ranks(sizes)[is_held]
    slot = first[is_held] + rank % among[is_held]
    if even:
        left = rank >= np.repeat(sizes - sizes % np.maximum(holders, 1), sizes)[is_held]
        # holders of before who are also chosen keep their sample
        takers, before = np.flatnonzero(holders_of_one_more(slots // nc, holders, sizes)), slot[left]
        before[~np.isin(before, takers)] = takers[~np.isin(takers, before)]
        slot[left] = before
    owner = np.full(labels.size, dealing.NOBODY)
    owner[order[is_held]] = slots[slot] // nc
    return owner


def _check_holders(names: Ints, sizes: Ints, holders: Ints) -> None:
    """Refuse a class with fewer samples than holders, and warn of classes without holders."""
    if (sizes < holders).any():
        c = int(np.flatnonzero(sizes < holders)[0])
        raise ValueError(
            f"class {names[c]} has {sizes[c]} samples for {holders[c]} clients that hold it; "
            "lower federation.num_clients or partition.nc"
        )
    if (holders == 0).any():
        text = (
            f"federation.num_clients x partition.nc is {holders.sum()}, below the {names.size} classes: "
            f"{np.count_nonzero(holders == 0)} classes with {sizes[holders == 0].sum()} samples are left out"
        )
        warnings.warn(text, stacklevel=3)


def _check_room(wanted: Ints, room: Ints) -> None:
    """Refuse counts (K, C) above the samples of a class (C,); the error names the first client and class."""
    if (wanted > room).any():
        i, c = np.argwhere(wanted > room)[0]
        raise ValueError(
            f"client {i} asks for {wanted[i, c]} samples of class {c}, which has {room[c]}; "
            f"lower partition.fractions[{i}] or partition.class_ratios[{i}][{c}]"
        )
