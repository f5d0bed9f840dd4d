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
DEPENDENT = 1e-10  # of a vector's norm: what orthogonalisation leaves below this is rounding


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


def lanczos(matvec: MatVec, size: int, k: int, steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Find the eigenvalues of largest magnitude of a symmetric matrix, with full reorthogonalisation.

    Ritz values of the Krylov space of a random vector (Golub and Van Loan 2013, section 10.1); where that space ends
    early, another random vector starts a new one. The matrix is projected by its products as they are, and each bound
    is the norm of the residual A v - lambda v from these: some eigenvalue lies as near as that. It also holds what a
    recurrence would hide, the rounding of products in float32.

    Args:
        matvec: product with a vector: float64 (P,) -> (P,).
        size: P.
        k: eigenvalues wanted.
        steps: products, no more than P of which are made.
        generator: draws the first vector, on the CPU.

    Returns:
        The values (k,), largest magnitude first, and their bounds (k,), float64.

    Raises:
        ValueError: ``k`` is not from 1 to ``size``, ``steps`` are fewer than ``k``, or a product is not finite.

    """
    check_number("curvature.k", k, least=1, most=size, whole=True)
    check_whole("curvature.steps", steps, k)
    steps = min(steps, size)
    basis, images = torch.zeros(2, steps, size, dtype=torch.float64)
    following = torch.randn(size, generator=generator, dtype=torch.float64)
    for step in range(steps):
        basis[step] = _orthonormal(following, basis[:step], generator)
        images[step] = following = matvec(basis[step]).double().to(basis.device)
        if not bool(following.isfinite().all()):
            raise ValueError("the product of the Hessian with a vector is not finite: the model has diverged")
    projected = basis @ images.T
    values, vectors = torch.linalg.eigh((projected + projected.T) / 2)
    top = values.abs().argsort(descending=True)[:k]
    values, vectors = values[top], vectors[:, top].T
    residuals = vectors @ images - values.unsqueeze(1) * (vectors @ basis)
    return values, torch.linalg.vector_norm(residuals, dim=1)


def _orthonormal(vector: Tensor, basis: Tensor, generator: torch.Generator) -> Tensor:
    """Orthogonalise a vector (P,) against a basis (j, P), or a random one in its place if it depends on the basis."""
    rest = _without(vector, basis)
    if not torch.linalg.vector_norm(rest) > DEPENDENT * torch.linalg.vector_norm(vector):
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


def sketch(matmat: MatMat, size: int, products: int, generator: torch.Generator) -> Sketch:
    """Estimate trace and Frobenius norm from the same products by Hutch++ (Meyer et al. 2021, algorithm 1).

    A third of the products finds a space Q that holds most of the matrix, a third is exact on it, and a third estimates
    the rest by random signs g orthogonal to Q: the means of g'Ag and of |Ag|^2.

    Args:
        matmat: products with vectors: float64 (k, P) -> (k, P).
        size: P.
        products: m, at least 6: a standard error needs two of each third.
        generator: draws the signs, on the CPU.

    Raises:
        ValueError: too few products.

    """
    check_whole("curvature.products", products, 6)
    third = products // 3
    found = matmat(_signs(min(third, size), size, generator)).double().cpu()
    space = torch.linalg.qr(found.T).Q.T
    images = matmat(space).double().cpu()
    trace, square = float((space * images).sum()), float(images.square().sum())
    if len(space) == size:
        return Sketch(trace, 0.0, math.sqrt(square), 0.0)
    signs = _signs(products - 2 * third, size, generator)
    signs -= (signs @ space.T) @ space
    images = matmat(signs).double().cpu()
    traces, squares = (signs * images).sum(1), images.square().sum(1)
    frobenius = math.sqrt(square + float(squares.mean()))
    error = _standard_error(squares) / (2 * frobenius) if frobenius else 0.0  # of a root, by its slope
    return Sketch(trace + float(traces.mean()), _standard_error(traces), frobenius, error)


def hutchpp(matmat: MatMat, size: int, products: int, generator: torch.Generator) -> tuple[float, float]:
    """Estimate the trace of a symmetric matrix, with its standard error; arguments and errors as in ``sketch``."""
    found = sketch(matmat, size, products, generator)
    return found.trace, found.trace_error


def frobenius(values: Tensor) -> float:
    """Frobenius norm of what a matrix does along some eigenvectors, by their eigenvalues (k,): a lower bound."""
    return float(torch.linalg.vector_norm(values.double()))


def _signs(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Draw vectors of random signs: float64 (count, P)."""
    return torch.randint(2, (count, size), generator=generator).double() * 2 - 1


def _standard_error(values: Tensor) -> float:
    """Standard error of a mean."""
    return float(values.std() / math.sqrt(len(values)))
