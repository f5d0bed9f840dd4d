"""Curvature against explicit Hessians in float64, scipy and finite differences; the traps of torch are pinned."""

from __future__ import annotations

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from sklearn.datasets import load_digits
from torch import nn
from torch.autograd.functional import hessian, jvp
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from fedsparse.core.space import ParamSpace
from fedsparse.data.datasets import Split
from fedsparse.landscape import MeanLoss, Task, frobenius, hutchpp, hvp, lanczos, sketch
from fedsparse.models.vision import vit_digits

DIAGONAL = torch.tensor([4.0, 3.0, 1.0], dtype=torch.float64)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def losses(forward, x, y):
    return cross_entropy(forward(x), y, reduction="none")


def quadratic(row):
    return 0.5 * (DIAGONAL * row**2).sum()


def by_diagonal(vectors):
    return vectors * DIAGONAL


def samples(count, features, seed=0, dtype=torch.float64):
    g = gen(seed)
    x = torch.randn(count, features, generator=g, dtype=dtype)
    return Split(x, (x[:, :3].argmax(1) + 3 * (x[:, 3] > 0.5)) % 10)


@pytest.fixture(scope="module")
def trained():
    """An MLP of 610 parameters, trained a little on digits: net, split, row, and the Hessian of a plain loss."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10)).double()
    pixels, labels = load_digits(return_X_y=True)
    split = Split(torch.from_numpy(pixels[:300] / 6 - 0.8), torch.from_numpy(labels[:300]).long())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9)
    for _ in range(20):
        optimizer.zero_grad()
        cross_entropy(net(split.x), split.y).backward()
        optimizer.step()
    row = torch.cat([p.detach().flatten() for p in net.parameters()])
    assert len(row) == 610

    def loss(row):
        w1, b1, w2, b2 = row.split([512, 8, 80, 10])
        hidden = torch.tanh(split.x @ w1.view(8, 64).T + b1)
        return cross_entropy(hidden @ w2.view(10, 8).T + b2, split.y)

    return net, split, row, hessian(loss, row)


def largest(matrix, k):
    values = np.linalg.eigvalsh(matrix.numpy())
    return torch.from_numpy(values[np.argsort(-np.abs(values))[:k]].copy())


def test_a_quadratic_has_the_eigenvalues_trace_and_norms_of_its_diagonal():
    row, vectors = torch.randn(3, generator=gen(), dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(hvp(quadratic, row, vectors), torch.diag(DIAGONAL))
    values, bounds = lanczos(lambda v: hvp(quadratic, row, v.unsqueeze(0))[0], 3, 2, 40, gen())
    assert values.tolist() == pytest.approx([4.0, 3.0], abs=1e-12)
    assert bounds.max() < 1e-10
    assert frobenius(values) == pytest.approx(5.0)
    assert frobenius(lanczos(by_diagonal, 3, 3, 3, gen())[0]) == pytest.approx(math.sqrt(26))
    assert hutchpp(by_diagonal, 3, 30, gen()) == pytest.approx((8.0, 0.0))
    assert sketch(by_diagonal, 3, 9, gen()) == pytest.approx((8.0, 0.0, math.sqrt(26), 0.0))


def test_a_linear_loss_has_no_curvature_and_no_vectors_give_no_products():
    row = torch.ones(3)
    assert not hvp(lambda r: 2 * r.sum(), row, torch.eye(3)).any()
    assert hvp(lambda r: r[0] * 2, row, torch.eye(3)).shape == (3, 3)
    assert not hvp(lambda r: r[0] ** 2 + r[1], row, torch.eye(3)[1:]).any()
    assert hvp(lambda r: (r**2).sum(), row, torch.zeros(0, 3)).shape == (0, 3)
    other = torch.ones(3, requires_grad=True)  # another tensor that the gradient depends on
    assert not hvp(lambda r: (other * r).sum(), row, torch.eye(3)).any()
    assert not hvp(lambda r: (other**2).sum(), row, torch.eye(3)).any()


@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize(("batch", "largest_batch"), [(64, 60), (7, 7), (1000, 300)])  # of 300 samples, even batches
def test_products_over_batches_are_the_explicit_hessians(trained, batch, largest_batch, retain):
    net, split, row, explicit = trained
    sizes = []

    def noted(x):
        sizes.append(len(x))
        return x

    task = Task(net, ParamSpace.of(net), losses, inputs=noted)
    vectors = torch.randn(4, 610, generator=gen(), dtype=torch.float64)
    products = MeanLoss(task, split, batch=batch).hessian(row, retain)
    for _ in range(2):
        torch.testing.assert_close(products(vectors), vectors @ explicit, rtol=1e-10, atol=1e-13)
    assert max(sizes) == largest_batch
    assert sum(sizes) == (300 if retain else 600)  # graphs of all batches are kept, or made again by each product


@pytest.mark.parametrize(("samples", "batches"), [(128, [64, 64]), (130, [44, 43, 43])])
def test_batches_have_64_samples_at_most_and_no_graph_is_kept_unasked(trained, samples, batches):
    net, split, row, _ = trained
    sizes = []
    task = Task(net, ParamSpace.of(net), losses, inputs=lambda x: sizes.append(len(x)) or x)
    products = MeanLoss(task, Split(split.x[:samples], split.y[:samples])).hessian(row)
    assert sizes == []
    products(torch.ones(1, 610, dtype=torch.float64))
    assert sizes == batches


def bytes_of_a_sample(net, split):
    """Bytes that each further sample adds to what the graph of the gradient keeps, by plain autograd on 10 and 20."""
    kept = []
    for count in (10, 20):
        storages, parameters = {}, list(net.parameters())

        def note(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = losses(net, split.x[:count].clone(), split.y[:count].clone()).sum()
            torch.autograd.grad(loss, parameters, create_graph=True)
        kept.append(sum(storage.nbytes() for storage in storages.values()))
    return (kept[1] - kept[0]) // 10


def test_a_batch_is_fitted_into_the_room_that_graphs_may_take(trained):
    net, split, row, explicit = trained
    task, each = Task(net, ParamSpace.of(net), losses), bytes_of_a_sample(copy.deepcopy(net), split)
    whole = MeanLoss(task, split, batch=10**9)
    assert whole.fitted(row)[0].batch == 2**30 // each
    for room, batch, together in (
        (each * 300, 300, True),
        (each * 300 - 1, 299, False),
        (each * 7, 7, False),
        (1, 1, False),
    ):
        loss, fits = whole.fitted(row, room)
        assert (loss.batch, fits) == (batch, together)
        vectors = torch.ones(1, 610, dtype=torch.float64)
        torch.testing.assert_close(loss.hessian(row)(vectors), vectors @ explicit, rtol=1e-9, atol=1e-12)
    assert MeanLoss(task, split).fitted(row)[0].batch == 64
    linear = Task(net, task.space, lambda forward, x, y: forward(x).sum(1))  # whose gradient keeps no sample
    biases = task.space.where("2.bias")
    assert MeanLoss(linear, split, biases).fitted(row, room=10)[0].batch == 10
    one = MeanLoss(task, Split(split.x[:1], split.y[:1]), batch=10**9)
    assert one.fitted(row, each * 9)[0].batch == 9


@pytest.mark.parametrize("names", ["2.*", "*.bias", None])
def test_inside_and_outside_a_mask(trained, names):
    net, split, row, explicit = trained
    space = ParamSpace.of(net)
    mask = torch.rand(610, generator=gen(2)) < 0.3 if names is None else space.where(names)
    for marks in (mask, ~mask):
        loss = MeanLoss(Task(net, space, losses), split, marks)
        vectors = torch.randn(3, int(marks.sum()), generator=gen(), dtype=torch.float64)
        expected = vectors @ explicit[marks][:, marks]
        torch.testing.assert_close(loss.hessian(row)(vectors), expected, rtol=1e-10, atol=1e-13)
        gradient = loss.gradient(row)
        step = torch.zeros_like(row).masked_scatter(marks, vectors[0])
        slope = (loss(row + 1e-5 * step) - loss(row - 1e-5 * step)) / 2e-5
        assert float(gradient @ step) == pytest.approx(slope, rel=1e-6, abs=1e-9)
        assert not gradient[~marks].any()


def test_the_mean_loss_and_its_gradient_are_plain_autograds(trained):
    net, split, row, _ = trained
    net = copy.deepcopy(net)
    expected = cross_entropy(net(split.x), split.y)
    expected.backward()
    loss = MeanLoss(Task(net, ParamSpace.of(net), losses), split)
    assert loss(row) == pytest.approx(float(expected.detach()), rel=1e-12)
    torch.testing.assert_close(loss.gradient(row), torch.cat([p.grad.flatten() for p in net.parameters()]))
    other = 0.5 * row  # not where the network stands
    ParamSpace.of(net).write(net, other)
    assert loss(other) == pytest.approx(float(cross_entropy(net(split.x), split.y).detach()), rel=1e-12)


def by_curvlinops(net, split, vectors):
    """Products (k, P) with the Hessian of the mean loss, in batches of 128."""
    data = list(zip(split.x.split(128), split.y.split(128), strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch.jit, which it and torch.func use
        from curvlinops import HessianLinearOperator

        return (HessianLinearOperator(net, nn.CrossEntropyLoss(), list(net.parameters()), data) @ vectors.T).T


@pytest.mark.parametrize("layers", ["tanh", "conv", "layernorm"])
def test_products_are_those_of_curvlinops(trained, layers):
    """It goes wrong by 6 % through LayerNorm with weights (the trap below), and has no products through GroupNorm."""
    torch.manual_seed(1)
    net, split, _, _ = trained
    if layers == "conv":
        convolution = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 3, 3, stride=2), nn.Softplus(), nn.Flatten()]
        net = nn.Sequential(*convolution, nn.Linear(27, 10)).double()
    elif layers == "layernorm":
        norm = nn.LayerNorm(6, elementwise_affine=False)
        net = nn.Sequential(nn.Linear(64, 6), norm, nn.GELU(), nn.Linear(6, 10)).double()
    space, other = ParamSpace.of(net), copy.deepcopy(net)
    row = 1.3 * space.read(net)
    space.write(other, row)
    vectors = torch.randn(3, space.size, generator=gen(), dtype=torch.float64)
    found = MeanLoss(Task(net, space, losses), split).hessian(row)(vectors)
    torch.testing.assert_close(found, by_curvlinops(other, split, vectors), rtol=1e-9, atol=1e-12)
    assert found.abs().max() > 0.1


def test_lanczos_finds_the_explicit_hessians_eigenvalues_as_scipy_does(trained):
    explicit = trained[3]
    values, bounds = lanczos(lambda v: explicit @ v, 610, 5, 40, gen())
    torch.testing.assert_close(values, largest(explicit, 5), rtol=0, atol=1e-10)
    assert bounds.max() < 1e-8
    operator = LinearOperator((610, 610), matvec=lambda v: explicit.numpy() @ v, dtype=np.float64)
    scipys = eigsh(operator, k=5, which="LM", return_eigenvectors=False)
    np.testing.assert_allclose(np.sort(values.numpy()), np.sort(scipys), atol=1e-10)


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_eigenvalues_scale_as_the_matrix_does(trained, scale):
    explicit = trained[3]
    plain, other = (lanczos(lambda v, m=matrix: m @ v, 610, 5, 40, gen()) for matrix in (explicit, scale * explicit))
    torch.testing.assert_close(other[0], scale * plain[0], rtol=1e-10, atol=0)
    assert other[1].max() < 1e-8 * scale


def test_twenty_five_products_give_five_eigenvalues_and_the_bounds_of_fifteen_say_that_they_may_not(trained):
    explicit = trained[3]
    expected = largest(explicit, 5)
    for seed in range(5):
        values, bounds = lanczos(lambda v: explicit @ v, 610, 5, 25, gen(seed))
        torch.testing.assert_close(values, expected, rtol=1e-11, atol=0)
        assert bounds.max() < 1e-4 * float(expected[0])
        values, bounds = lanczos(lambda v: explicit @ v, 610, 5, 15, gen(seed))
        found = (values / expected - 1).abs().max() < 1e-4
        assert found or bounds.max() > 1e-3 * float(expected[0])


def test_twenty_eigenvalues_need_sixty_products_and_the_bounds_of_forty_say_so(trained):
    explicit = trained[3]
    expected, found = largest(explicit, 20), {s: lanczos(lambda v: explicit @ v, 610, 20, s, gen()) for s in (40, 60)}
    torch.testing.assert_close(found[60][0], expected, rtol=1e-10, atol=0)
    assert found[60][1].max() < 1e-7
    assert (found[40][0] / expected - 1).abs().max() > 0.005
    assert found[40][1].max() > 0.001 * float(expected[0])


@pytest.mark.parametrize("steps", [6, 12, 40])
def test_every_value_is_within_its_bound_of_an_eigenvalue(trained, steps):
    explicit = trained[3]
    every = torch.linalg.eigvalsh(explicit)
    products = []
    values, bounds = lanczos(lambda v: products.append(v) or explicit @ v, 610, 6, steps, gen(1))
    assert len(products) == steps + 6
    nearest = (values.unsqueeze(1) - every).abs().min(1).values
    assert (nearest <= bounds + 1e-12).all()
    assert values.abs().tolist() == sorted(values.abs().tolist(), reverse=True)
    if steps == 6:
        assert bounds.max() > 0.01 * float(values[0])  # too few steps: and the bound says so


def test_a_bound_holds_the_rounding_of_products():
    """A recurrence's own bound goes to 1e-16 in an operator that is wrong by 1e-3."""
    matrix = torch.diag(torch.linspace(10, 1, 30, dtype=torch.float64))
    noise = 1e-3 * torch.randn(30, 30, generator=gen(4), dtype=torch.float64)
    values, bounds = lanczos(lambda v: (matrix + noise) @ v, 30, 3, 30, gen())
    assert (bounds > 1e-3).all()
    assert ((values - torch.tensor([10.0, 9.7, 9.4])).abs() < 0.3).all()
    exact, tight = lanczos(lambda v: matrix @ v, 30, 3, 30, gen())
    assert tight.max() < 1e-12
    assert exact[0] == pytest.approx(10)


@pytest.mark.parametrize(
    "diagonal",
    [[2.0] * 6, [5.0, 5.0, 5.0, 1.0, 1.0, 0.0], [0.0] * 6, [-7.0, 3.0, 0.0, 0.0, 0.0, 0.0]],
    ids=["identity", "multiple", "zero", "indefinite"],
)
def test_a_krylov_space_that_ends_early_is_gone_on_from(diagonal):
    diagonal = torch.tensor(diagonal, dtype=torch.float64)
    values, bounds = lanczos(lambda v: diagonal * v, 6, 4, 6, gen())
    expected = diagonal[diagonal.abs().argsort(descending=True)[:4]]
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-12)
    assert bounds.max() < 1e-12


def test_products_in_float32_give_the_values_to_float32(trained):
    net, split, row, explicit = trained
    net, split = copy.deepcopy(net).float(), Split(split.x.float(), split.y)
    products = MeanLoss(Task(net, ParamSpace.of(net), losses), split).hessian(row.float())
    values, bounds = lanczos(lambda v: products(v.unsqueeze(0))[0], 610, 5, 40, gen())
    torch.testing.assert_close(values, largest(explicit, 5), rtol=1e-5, atol=0)
    assert 1e-9 < bounds.max() < 1e-5


def test_a_basis_in_float32_gives_values_to_the_square_of_its_rounding(trained):
    """A Rayleigh quotient errs by the square of its vector's error, if the vector has length 1."""
    explicit = trained[3]
    values, bounds = lanczos(lambda v: explicit @ v, 610, 5, 40, gen(), dtype=torch.float32)
    torch.testing.assert_close(values, largest(explicit, 5), rtol=1e-11, atol=0)
    assert 1e-9 < bounds.max() < 1e-5
    tied = torch.tensor([5.0, 5.0, 5.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    values, bounds = lanczos(lambda v: tied * v, 6, 4, 6, gen(), dtype=torch.float32)
    torch.testing.assert_close(values, tied[:4], rtol=1e-11, atol=0)
    assert bounds.max() < 1e-5


def test_what_lanczos_refuses():
    for k, steps, line in (
        (4, 10, "curvature.k is 4; it must be a whole number from 1 to 3"),
        (0, 10, "curvature.k is 0; it must be a whole number from 1 to 3"),
        (3, 2, "curvature.steps is 2; it must be a whole number of 3 or more"),
    ):
        with pytest.raises(ValueError, match=line):
            lanczos(by_diagonal, 3, k, steps, gen())
    for steps in (1, 2):
        with pytest.raises(ValueError, match="not finite: the model has diverged"):
            lanczos(lambda v: v * torch.tensor([1.0, math.nan, 1.0]), 3, 1, steps, gen())
    with pytest.raises(ValueError, match="curvature.products is 5; it must be a whole number of 6 or more"):
        hutchpp(by_diagonal, 3, 5, gen())


def hutchinson(matrix, products, seed):
    signs = torch.randint(2, (products, len(matrix)), generator=gen(seed)).double() * 2 - 1
    return float((signs @ matrix * signs).sum(1).mean())


def test_hutchpp_is_nearer_the_trace_than_hutchinson_and_its_error_is_honest(trained):
    explicit = trained[3]
    trace, norm = float(explicit.trace()), float(explicit.norm())
    found = [sketch(lambda v: v @ explicit, 610, 60, gen(seed)) for seed in range(200)]
    assert hutchpp(lambda v: v @ explicit, 610, 60, gen(3)) == (found[3].trace, found[3].trace_error)
    plus = np.array([f.trace for f in found]) / trace - 1
    plain = np.array([hutchinson(explicit, 60, seed) for seed in range(200)]) / trace - 1
    assert np.sqrt((plus**2).mean()) < 0.5 * np.sqrt((plain**2).mean())
    assert abs(plus.mean()) < 4 * plus.std() / math.sqrt(200)
    stated = np.sqrt(np.mean([f.trace_error**2 for f in found])) / trace
    assert stated == pytest.approx(np.sqrt((plus**2).mean()), rel=0.25)
    few = np.array([hutchpp(lambda v: v @ explicit, 610, 30, gen(seed))[0] for seed in range(200)]) / trace - 1
    rough = np.array([hutchinson(explicit, 30, seed) for seed in range(200)]) / trace - 1
    assert np.sqrt((few**2).mean()) < 0.05 < np.sqrt((rough**2).mean())
    norms = np.array([f.frobenius for f in found])
    assert norms.mean() == pytest.approx(norm, rel=0.01)
    stated = np.sqrt(np.mean([f.frobenius_error**2 for f in found]))
    assert stated == pytest.approx(norms.std(), rel=0.4)


def test_the_error_of_a_norm_is_that_of_its_square_over_twice_the_norm():
    """By hand, in numpy, from the same signs: two thirds go into the space and its products."""
    size, products, root = 40, 18, np.random.default_rng(0)
    matrix = root.normal(size=(size, size))
    matrix = torch.from_numpy(matrix + matrix.T)
    calls = []

    def noted(vectors):
        calls.append(vectors.numpy().copy())
        return vectors @ matrix

    found = sketch(noted, size, products, gen())
    drawn = calls[2] @ matrix.numpy()
    squares = (drawn**2).sum(1)
    square = ((calls[1] @ matrix.numpy()) ** 2).sum() + squares.mean()
    assert found.frobenius == pytest.approx(math.sqrt(square), rel=1e-12)
    assert found.frobenius_error == pytest.approx(
        squares.std(ddof=1) / math.sqrt(len(squares)) / (2 * math.sqrt(square)), rel=1e-10
    )
    assert sketch(lambda v: 0 * v, size, products, gen()) == (0.0, 0.0, 0.0, 0.0)


def test_a_sketch_makes_no_more_products_than_it_may(trained):
    counted = []
    for products in (6, 30, 31, 32):
        counted.clear()
        sketch(lambda v: counted.append(len(v)) or v @ trained[3], 610, products, gen())
        assert sum(counted) == products


def layernorm_loss():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 10)).double()
    space, split = ParamSpace.of(net), samples(20, 4)

    def loss(row):
        return cross_entropy(functional_call(net, space.unflatten(row), (split.x,)), split.y)

    return loss, space.read(net)


def by_differences(loss, row, vector, step=1e-5):
    ends = [(row + s * vector).requires_grad_() for s in (step, -step)]
    gradients = [torch.autograd.grad(loss(end), end)[0] for end in ends]
    return (gradients[0] - gradients[1]) / (2 * step)


def test_products_through_layernorm_are_right_where_grad_of_jvp_is_not():
    loss, row = layernorm_loss()
    vector = torch.randn(len(row), generator=gen(), dtype=torch.float64)
    expected = by_differences(loss, row, vector)
    (found,) = hvp(loss, row, vector.unsqueeze(0))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch.jit, which torch.func imports
        wrong = torch.func.grad(lambda r: torch.func.jvp(loss, (r,), (vector,))[1])(row)
    assert (wrong - expected).norm() > 0.01 * expected.norm()  # should this fail, torch has mended it
    _, right = jvp(lambda r: torch.autograd.grad(loss(r), r, create_graph=True)[0], row, vector, create_graph=True)
    torch.testing.assert_close(right, expected, rtol=1e-6, atol=1e-8)


def test_products_through_attention_are_right_where_fused_attention_has_none():
    net = vit_digits(10).double()
    for block in net.blocks:
        block.attn.fused_attn = True  # as timm has it, and BERT
    space, g = ParamSpace.of(net), gen(1)
    split = Split(torch.randn(6, 1, 8, 8, generator=g, dtype=torch.float64), torch.randint(10, (6,), generator=g))
    task, row = Task(net, space, losses), space.read(net)
    vector = torch.randn(space.size, generator=gen(), dtype=torch.float64)
    vector /= vector.norm()

    def loss(row):
        return cross_entropy(functional_call(task.net, space.unflatten(row), (split.x,)), split.y)

    (found,) = MeanLoss(task, split).hessian(row)(vector.unsqueeze(0))
    expected = by_differences(loss, row, vector, 1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7 * float(expected.abs().max()) + 1e-8)
    leaf = row.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="derivative for .*attention.* is not implemented"):
        torch.autograd.grad(torch.autograd.grad(loss(leaf), leaf, create_graph=True)[0] @ vector, leaf)


def test_batchnorm_is_constant_in_a_derivative_with_the_statistics_of_the_row():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 10)).double()
    space, split, training = ParamSpace.of(net), samples(20, 4), samples(60, 4, seed=5)
    task, row = Task(net, space, losses, training=training), 2 * space.read(net)
    mean_loss = MeanLoss(task, split)
    products, gradient = mean_loss.hessian(row), mean_loss.gradient(row)
    mean_loss(0.1 * row)  # which moves the statistics of the copy
    plain = copy.deepcopy(net).train()
    space.write(plain, row)
    plain[1].momentum = None
    plain[1].reset_running_stats()
    plain(training.x)
    plain.eval()

    def loss(row):
        return cross_entropy(functional_call(plain, space.unflatten(row), (split.x,)), split.y)

    explicit, leaf = hessian(loss, row), row.clone().requires_grad_()
    torch.testing.assert_close(products(torch.eye(space.size, dtype=torch.float64)), explicit)
    torch.testing.assert_close(gradient, torch.autograd.grad(loss(leaf), leaf)[0])
    assert mean_loss(row) == pytest.approx(float(loss(row).detach()), rel=1e-12)


def test_nothing_to_differentiate_is_refused(trained):
    net, split, *_ = trained
    task = Task(net, ParamSpace.of(net), losses)
    with pytest.raises(ValueError, match="no coordinate lies inside the mask"):
        MeanLoss(task, split, torch.zeros(610, dtype=torch.bool))
    with pytest.raises(ValueError, match="at least one sample"):
        MeanLoss(task, Split(split.x[:0], split.y[:0]))
    with pytest.raises(ValueError, match="batch is 0; it must be a whole number of 1 or more"):
        MeanLoss(task, split, batch=0)


class Draws(nn.Module):
    """A layer that draws in eval mode too."""

    def forward(self, x):
        return x * (1 + 0.1 * torch.randn_like(x))


def test_curvature_of_a_network_that_draws_leaves_the_random_state_alone(trained):
    _, split, _, _ = trained
    net = nn.Sequential(Draws(), nn.Linear(64, 10)).double()
    space = ParamSpace.of(net)
    loss, row, vectors = MeanLoss(Task(net, space, losses), split), space.read(net), torch.ones(1, space.size).double()
    calls = [lambda: loss(row), lambda: loss.gradient(row), lambda: loss.hessian(row)(vectors)]
    for call in [*calls, lambda: loss.hessian(row, retain=True)]:
        before = torch.get_rng_state()
        call()
        assert torch.equal(before, torch.get_rng_state())


def test_curvature_leaves_the_network_and_the_random_state_alone(trained):
    net, split, row, _ = trained
    net = copy.deepcopy(net).train()
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    loss = MeanLoss(Task(net, ParamSpace.of(net), losses), split)
    loss(2 * row)
    loss.gradient(2 * row)
    loss.hessian(2 * row)(torch.ones(2, 610, dtype=torch.float64))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert torch.equal(random, torch.get_rng_state())
