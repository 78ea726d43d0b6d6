"""Linear classifiers that are solved for, not descended to. Floor 0: torch only, one task at a time.

All run under `vmap` and `inference_mode`, in float64 where the device has it, whatever autocast
says, and give weights as `torch.nn.Linear` has them: logits = z @ weight.T + bias. m support
images are few, so all but the primal form of `ridge` work on the (m, m) Gram matrix.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor

P = ParamSpec("P")


def _precise(solve: Callable[P, Any]) -> Callable[P, Any]:
    """Have a solver compute in float64, or in float32 on Apple's GPUs, outside of autocast."""

    def cast(x: Any, dtype: torch.dtype) -> Any:
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    @functools.wraps(solve)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Any:
        z = args[0]
        assert isinstance(z, Tensor)
        inside = torch.float32 if z.device.type == "mps" else torch.float64
        with torch.autocast(z.device.type, enabled=False):
            solution = solve(*(cast(x, inside) for x in args), **kwargs)  # type: ignore[arg-type]
        outside = torch.promote_types(z.dtype, torch.float32)
        if isinstance(solution, Tensor):
            return cast(solution, outside)
        return tuple(cast(x, outside) for x in solution)

    return wrapper


def one_hot(y: Tensor, n_way: int, dtype: torch.dtype) -> Tensor:
    """Classes (m,) as rows of an indicator matrix (m, n_way)."""
    return (y.unsqueeze(1) == torch.arange(n_way, device=y.device)).to(dtype)


@_precise
def ridge(z: Tensor, targets: Tensor, l2: float | Tensor, dual: bool | None = None) -> Tensor:
    """The weights W that minimise ||z W^T - targets||^2 + l2 ||W||^2; differentiable.

    Bertinetto et al. 2019, https://arxiv.org/abs/1805.08136, eq. 4 (primal) and 6 (dual, by
    Woodbury's identity).

    Args:
        z: (m, d).
        targets: (m, n).
        l2: greater than 0.
        dual: whether to solve for m unknowns an output, or for d; None takes the fewer.

    Returns:
        (n, d).
    """
    m, d = z.shape
    if dual if dual is not None else m <= d:
        eye = torch.eye(m, dtype=z.dtype, device=z.device)
        return torch.linalg.solve(z @ z.T + l2 * eye, targets).T @ z
    eye = torch.eye(d, dtype=z.dtype, device=z.device)
    return torch.linalg.solve(z.T @ z + l2 * eye, z.T @ targets).T


@_precise
def logistic_regression(
    z: Tensor, y: Tensor, n_way: int, l2: float, steps: int = 20
) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression: minimises sum of cross-entropies + l2/2 ||weight||^2.

    The bias is free. Newton's method in the form of Rasmussen, Williams 2006, algorithm 3.3 (n_way
    systems of m unknowns, not one of n_way * m), each step as long as lowers the objective most.
    Two classes share one weight vector, w and -w halved, as is the custom: l2/2 ||w||^2.

    Args:
        z: (m, d).
        y: (m,), classes 0..n_way-1, each present.
        n_way: number of classes.
        l2: greater than 0; scikit-learn's 1/C.
        steps: of Newton's method; it mostly needs about ten.

    Returns:
        Weight (n_way, d) and bias (n_way,), each with class mean 0. Not meant to be differentiated.
    """
    with torch.no_grad():
        l2 = 2 * l2 if n_way == 2 else l2
        target, gram = one_hot(y, n_way, z.dtype), z @ z.T  # (m, n_way), (m, m)
        lengths = 0.5 ** torch.arange(16, dtype=z.dtype, device=z.device)
        a, b = torch.zeros_like(target), torch.zeros_like(target[0])  # weight = a.T @ z
        for _ in range(steps):
            da, db = _newton_step(gram, target, l2, a, b)
            logits, d_logits = gram @ a + b, gram @ da + db  # (m, n_way)
            tried = logits + lengths.view(-1, 1, 1) * d_logits  # (lengths, m, n_way)
            loss = (torch.logsumexp(tried, 2) - (tried * target).sum(2)).sum(1)
            slope, curvature = (da * (gram @ a)).sum(), (da * (gram @ da)).sum()
            penalty = l2 * (lengths * slope + lengths.square() * curvature / 2)
            length = lengths.gather(0, (loss + penalty).argmin().unsqueeze(0))
            a, b = a + length * da, b + length * db
        return a.T @ z, b - b.mean()


def _newton_step(
    gram: Tensor, target: Tensor, l2: float, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    """Where Newton's method goes from coefficients a (m, n_way) and bias b (n_way,).

    At the new point l2 a = target - p - W (f' - f), f' = gram a + b, W = diag(p) - p p^T image by
    image. With u the mean of f' under p that is, class by class, (l2 + p gram) a = rhs + p (u - b);
    u and b follow from sum_class a = 0 and sum_image a = 0, and are free up to one constant.
    """
    m, n_way = target.shape
    logits = gram @ a + b
    p = logits.softmax(1)  # (m, n_way)
    rhs = p * (logits - (p * logits).sum(1, keepdim=True)) + target - p
    eye = torch.eye(m, dtype=gram.dtype, device=gram.device)
    weighted = p.T.unsqueeze(2)  # (n_way, m, 1)
    both = torch.cat([rhs.T.unsqueeze(2), weighted * eye], dim=2)  # (n_way, m, 1+m)
    both = torch.linalg.solve(l2 * eye + weighted * gram, both)
    g, r = both[:, :, 0], both[:, :, 1:]  # (n_way, m), (n_way, m, m)
    row = r.sum(2)  # (n_way, m)
    system = torch.cat(
        [torch.cat([r.sum(0), -row.T], 1), torch.cat([-row, torch.diag(row.sum(1))], 1)]
    )
    system = system + system.diagonal().mean()  # the constant is then 0
    u, new_b = torch.linalg.solve(system, torch.cat([-g.sum(0), g.sum(1)])).split([m, n_way])
    new_a = g + (r @ (u - new_b.unsqueeze(1)).unsqueeze(2)).squeeze(2)  # (n_way, m)
    return new_a.T - a, new_b - b
