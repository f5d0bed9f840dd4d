"""Products with a Hessian, its largest eigenvalues, its trace and its norm, without the Hessian itself.

Shapes: P coordinates, k vectors or eigenvalues, m products.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedsparse.core.checks import check_number, check_whole

MatVec = Callable[[Tensor], Tensor]
MatMat = Callable[[Tensor], Tensor]
# of a vector's norm: what orthogonalisation leaves below this is rounding
DEPENDENT = {torch.float64: 1e-10, torch.float32: 1e-5}


def hvp(loss: Callable[[Tensor], Tensor], row: Tensor, vectors: Tensor) -> Tensor:
    """Multiply vectors by the Hessian of a loss, by double backward (Pearlmutter 1994).

    The graph of one gradient serves all k products. ``grad`` of ``jvp`` would do in one pass and is wrong through
    LayerNorm, without an error (torch 2.15, pytorch #196700). Fused attention has no double backward: the plain one is
    used.

    Args:
        loss: a function of the row, (P,) -> ().
        row: where the Hessian is taken (P,).
        vectors: (k, P).

    Returns:
        (k, P), in the dtype of the row.

    """
    return differentiated(loss, row)(vectors)


def differentiated(loss: Callable[[Tensor], Tensor], row: Tensor) -> MatMat:
    """Build the graph of a gradient: the products of ``hvp`` at a row, as long as its result is kept."""
    leaf = row.detach().clone().requires_grad_()
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        (gradient,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True, materialize_grads=True)

    def product(vector: Tensor) -> Tensor:
        return torch.autograd.grad(gradient, leaf, vector, retain_graph=True, materialize_grads=True)[0]

    def products(vectors: Tensor) -> Tensor:
        if not len(vectors) or not gradient.requires_grad:  # of a linear loss
            return torch.zeros_like(vectors, dtype=row.dtype, device=row.device)
        return torch.stack([product(vector) for vector in vectors.to(gradient)])

    return products


def lanczos(
    matvec: MatVec,
    size: int,
    k: int,
    steps: int,
    generator: torch.Generator,
    *,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Find the eigenvalues of largest magnitude of a symmetric matrix, with full reorthogonalisation.

    Ritz vectors of the Krylov space of a random vector (Golub and Van Loan 2013, section 10.1); where that space ends
    early, another random vector starts a new one. Each value is the Rayleigh quotient of its vector, by one more
    product, and each bound the norm of the residual A v - lambda v: some eigenvalue lies as near as that. It also holds
    what a recurrence would hide, the rounding of basis and products.

    Args:
        matvec: product with a vector: float64 (P,) -> (P,).
        size: P.
        k: eigenvalues wanted.
        steps: dimension of the Krylov space, no more than P; there are k products more.
        generator: draws the first vector, on the CPU.
        dtype: of the basis (steps, P), on the CPU: 3.5 GB in float32 for ViT-S at 40 steps.

    Returns:
        The values (k,), largest magnitude first, and their bounds (k,), float64.

    Raises:
        ValueError: ``k`` is not from 1 to ``size``, ``steps`` are fewer than ``k``, or a product is not finite.

    """
    check_number("curvature.k", k, least=1, most=size, whole=True)
    check_whole("curvature.steps", steps, k)
    steps = min(steps, size)
    basis, projected = torch.zeros(steps, size, dtype=dtype), torch.zeros(steps, steps, dtype=torch.float64)
    following = torch.randn(size, generator=generator, dtype=dtype)
    for step in range(steps):
        basis[step] = _orthonormal(following, basis[:step], generator)
        following = _product(matvec, basis[step]).to(dtype)
        projected[step, : step + 1] = basis[: step + 1] @ following
    ritz, vectors = torch.linalg.eigh(projected)  # of the lower triangle
    found = [_rayleigh(matvec, vectors[:, i].to(dtype) @ basis) for i in ritz.abs().argsort(descending=True)[:k]]
    values, bounds = torch.tensor(found, dtype=torch.float64).T
    order = values.abs().argsort(descending=True)
    return values[order], bounds[order]


def _rayleigh(matvec: MatVec, vector: Tensor) -> tuple[float, float]:
    """Rayleigh quotient of a vector (P,), and the norm of its residual."""
    vector = vector.double()
    vector /= torch.linalg.vector_norm(vector)
    image = _product(matvec, vector)
    value = vector @ image
    return float(value), float(torch.linalg.vector_norm(image - value * vector))


def _product(matvec: MatVec, vector: Tensor) -> Tensor:
    """Multiply a vector (P,): float64 on the CPU.

    Raises:
        ValueError: the product is not finite.

    """
    image = matvec(vector.double()).double().cpu()
    if not bool(image.isfinite().all()):
        raise ValueError("the product of the Hessian with a vector is not finite: the model has diverged")
    return image


def _orthonormal(vector: Tensor, basis: Tensor, generator: torch.Generator) -> Tensor:
    """Orthogonalise a vector (P,) against a basis (j, P), or a random one in its place if it depends on the basis."""
    rest = _without(vector, basis)
    if not torch.linalg.vector_norm(rest) > DEPENDENT[vector.dtype] * torch.linalg.vector_norm(vector):
        rest = _without(torch.randn(len(vector), generator=generator, dtype=vector.dtype), basis)
    return rest / torch.linalg.vector_norm(rest)


def _without(vector: Tensor, basis: Tensor) -> Tensor:
    """Subtract a vector's projection on a basis; once leaves rounding behind, twice does not (Giraud et al. 2005)."""
    rest = vector - (basis @ vector) @ basis
    return rest - (basis @ rest) @ basis


class Sketch(NamedTuple):
    """Estimates of a symmetric matrix from random products.

    Attributes:
        trace: of the matrix.
        trace_error: its standard error; 0 where the products span the whole space.
        frobenius: norm of the matrix.
        frobenius_error: its standard error.

    """

    trace: float
    trace_error: float
    frobenius: float
    frobenius_error: float


def sketch(
    matmat: MatMat, size: int, products: int, generator: torch.Generator, *, dtype: torch.dtype = torch.float64
) -> Sketch:
    """Estimate trace and Frobenius norm from the same products by Hutch++ (Meyer et al. 2021, algorithm 1).

    A third of the products finds a space Q that holds most of the matrix, a third is exact on it, and a third estimates
    the rest by random signs g orthogonal to Q: the means of g'Ag and of |Ag|^2.

    Args:
        matmat: products with vectors: float64 (k, P) -> (k, P).
        size: P.
        products: m, at least 6: a standard error needs two of each third.
        generator: draws the signs, on the CPU.
        dtype: of the vectors, of which about four times m / 3 are held at once.

    Raises:
        ValueError: too few products.

    """
    check_whole("curvature.products", products, 6)
    third = products // 3
    found = matmat(_signs(min(third, size), size, generator, dtype)).to("cpu", dtype)
    space = torch.linalg.qr(found.T).Q.T
    images = matmat(space).to("cpu", dtype)
    trace, square = float(_dots(space, images).sum()), float(_dots(images, images).sum())
    if len(space) == size:
        return Sketch(trace, 0.0, math.sqrt(square), 0.0)
    signs = _signs(products - 2 * third, size, generator, dtype)
    signs -= (signs @ space.T) @ space
    images = matmat(signs).to("cpu", dtype)
    traces, squares = _dots(signs, images), _dots(images, images)
    frobenius = math.sqrt(square + float(squares.mean()))
    error = _standard_error(squares) / (2 * frobenius) if frobenius else 0.0  # of a root, by its slope
    return Sketch(trace + float(traces.mean()), _standard_error(traces), frobenius, error)


def _dots(first: Tensor, second: Tensor) -> Tensor:
    """Inner products of rows (k, P), each computed in float64: (k,)."""
    return torch.stack([a.double() @ b.double() for a, b in zip(first, second, strict=True)])


def hutchpp(matmat: MatMat, size: int, products: int, generator: torch.Generator) -> tuple[float, float]:
    """Estimate the trace of a symmetric matrix, with its standard error; arguments and errors as in ``sketch``."""
    found = sketch(matmat, size, products, generator)
    return found.trace, found.trace_error


def frobenius(values: Tensor) -> float:
    """Frobenius norm of what a matrix does along some eigenvectors, by their eigenvalues (k,): a lower bound."""
    return float(torch.linalg.vector_norm(values.double()))


def _signs(count: int, size: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Draw vectors of random signs: (count, P)."""
    return torch.randint(2, (count, size), generator=generator, dtype=torch.int8).to(dtype).mul_(2).sub_(1)


def _standard_error(values: Tensor) -> float:
    """Standard error of a mean."""
    return float(values.std() / math.sqrt(len(values)))
