"""Linear classifiers that are solved for, not descended to. Floor 0: torch only, one task each.

All run under `vmap` and `inference_mode`, in float64 where the device has it, whatever autocast
says, and give weights as `torch.nn.Linear` has them: logits = z @ weight.T + bias. m support
images are few, so all but the primal form of `ridge` work on the (m, m) Gram matrix.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def _precise(solve: Callable[P, R]) -> Callable[P, R]:
    """Have a solver compute in float64, or in float32 on Apple's GPUs, outside of autocast."""

    @functools.wraps(solve)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        z: Any = args[0]
        inside = torch.float32 if z.device.type == "mps" else torch.float64
        with torch.autocast(z.device.type, enabled=False):
            given: Any = [_cast(x, inside) for x in args]
            solution: Any = solve(*given, **kwargs)
        outside = torch.promote_types(z.dtype, torch.float32)
        if isinstance(solution, tuple):
            return tuple(_cast(x, outside) for x in solution)  # type: ignore[return-value]
        return _cast(solution, outside)

    return wrapper


def _cast(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def indicators(y: Tensor, n_way: int, dtype: torch.dtype) -> Tensor:
    """Classes (m,) as indicators (n_way, m)."""
    return (torch.arange(n_way, device=y.device).unsqueeze(1) == y).to(dtype)


def _eye(n: int, like: Tensor) -> Tensor:
    return torch.eye(n, dtype=like.dtype, device=like.device)


@_precise
def ridge(z: Tensor, targets: Tensor, l2: float | Tensor, dual: bool | None = None) -> Tensor:
    """The weight W that minimises ||z W^T - targets^T||^2 + l2 ||W||^2; differentiable.

    The primal form and, by Woodbury's identity, the dual one (Bertinetto et al. 2019, section 3.2,
    https://arxiv.org/abs/1805.08136).

    Args:
        z: (m, d).
        targets: (n, m), a row for each output.
        l2: greater than 0.
        dual: whether to solve for m unknowns an output, or for d; None takes the fewer.

    Returns:
        (n, d).
    """
    m, d = z.shape
    if m <= d if dual is None else dual:
        return torch.linalg.solve(z @ z.T + l2 * _eye(m, z), targets.T).T @ z
    return torch.linalg.solve(z.T @ z + l2 * _eye(d, z), (targets @ z).T).T


@_precise
def irls(z: Tensor, y: Tensor, n_way: int, l2: float | Tensor, steps: int) -> Tensor:
    """A binary logistic regression for each class, itself against the rest; differentiable.

    Minimises the sum of log losses + l2/2 ||w||^2 by iteratively reweighted least squares from
    w = 0. Bertinetto et al. 2019, section 3.3, in dual form; with w = a z a step is
    a <- a + (l2 + S gram)^-1 (target - mu - l2 a), S = mu (1 - mu), which is theirs without a
    division by S.

    Args:
        z: (m, d); a column of ones makes a bias.
        y: (m,), classes 0..n_way-1, each present.
        n_way: number of classes.
        l2: greater than 0.
        steps: of Newton's method, which this is.

    Returns:
        (n_way, d).
    """
    target, gram = indicators(y, n_way, z.dtype), z @ z.T  # (n_way, m), (m, m)
    penalty = l2 * _eye(len(y), z)
    a = torch.zeros_like(target)
    for _ in range(steps):
        mu = (a @ gram).sigmoid()
        reweighted = penalty + (mu * (1 - mu)).unsqueeze(2) * gram  # (n_way, m, m)
        a = a + torch.linalg.solve(reweighted, target - mu - l2 * a)
    return a @ z


def _by_class(gram: Tensor, share: Tensor, weight: Tensor) -> Tensor:
    """Inverses of diag(share) + diag(weight) gram: (m, m), two (n_way, m) -> (n_way, m, m)."""
    system = share.unsqueeze(2) * _eye(len(gram), gram) + weight.unsqueeze(2) * gram
    return torch.linalg.inv(system)


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Class by class: (n_way, m, m), (n_way, m) -> (n_way, m)."""
    return (matrices @ vectors.unsqueeze(2)).squeeze(2)


@_precise
def logistic_regression(
    z: Tensor, y: Tensor, n_way: int, l2: float, steps: int = 20
) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression: minimises sum of cross-entropies + l2/2 ||weight||^2.

    The bias is free. Newton's method in the form of Rasmussen, Williams 2006, algorithm 3.3 (n_way
    systems of m unknowns, not one of n_way * m), each step as long as lowers the objective most.
    Two classes are one logistic regression with weight w, l2/2 ||w||^2, of which they hold half
    each, as scikit-learn has it.

    Args:
        z: (m, d).
        y: (m,), classes 0..n_way-1, each present.
        n_way: number of classes.
        l2: greater than 0; scikit-learn's 1/C.
        steps: of Newton's method; it mostly needs about ten.

    Returns:
        Weight (n_way, d) and bias (n_way,), both with mean 0 over classes; no gradient.
    """
    with torch.no_grad():
        l2 = 2 * l2 if n_way == 2 else l2
        target, gram = indicators(y, n_way, z.dtype), z @ z.T  # (n_way, m), (m, m)
        lengths = 0.5 ** torch.arange(16, dtype=z.dtype, device=z.device)
        a, b = torch.zeros_like(target), torch.zeros_like(target[:, :1])  # weight = a @ z
        for _ in range(steps):
            da, db = _newton_step(gram, target, l2, a, b)
            logits, d_logits = a @ gram + b, da @ gram + db  # (n_way, m)
            tried = logits + lengths.view(-1, 1, 1) * d_logits  # (lengths, n_way, m)
            loss = (tried.logsumexp(1) - (tried * target).sum(1)).sum(1)
            slope, curvature = (da * (a @ gram)).sum(), (da * (da @ gram)).sum()
            loss = loss + l2 * (lengths * slope + lengths.square() * curvature / 2)
            length = lengths.gather(0, loss.argmin().unsqueeze(0))
            a, b = a + length * da, b + length * db
        return a @ z, (b - b.mean()).flatten()


def _newton_step(
    gram: Tensor, target: Tensor, l2: float, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    """By how much Newton's method changes coefficients a (n_way, m) and bias b (n_way, 1).

    The new ones satisfy l2 a = target - p - W (f' - f), f' = a gram + b, W = diag(p) - p p^T image
    by image. With u the mean of f' under p that is (l2 + p gram) a = rhs + p (u - b) class by
    class; u and b follow from sum_class a = 0 and sum_image a = 0, up to one constant.
    """
    n_way, m = target.shape
    logits = a @ gram + b
    p = logits.softmax(0)
    rhs = p * (logits - (p * logits).sum(0)) + target - p
    inverse = _by_class(gram, torch.full_like(p, l2), p)
    g, r = _times(inverse, rhs), inverse * p.unsqueeze(1)
    row = r.sum(2)  # (n_way, m)
    system = torch.cat(
        [torch.cat([r.sum(0), -row.T], 1), torch.cat([-row, torch.diag(row.sum(1))], 1)]
    )
    system = system + system.diagonal().mean()  # the constant is then 0
    u, new_b = torch.linalg.solve(system, torch.cat([-g.sum(0), g.sum(1)])).split([m, n_way])
    new_b = new_b.unsqueeze(1)
    return g + _times(r, u - new_b) - a, new_b - b


@_precise
def crammer_singer(z: Tensor, y: Tensor, n_way: int, c: float | Tensor, steps: int = 15) -> Tensor:
    """The multi-class SVM without bias: minimises ||W||^2/2 + c sum of hinges; differentiable.

    Crammer, Singer 2001; hinge = max over classes of (logit + [class is wrong]) - logit of y. Its
    dual is solved in the form W = c (target - p) z, each image's p a distribution over classes, as
    softmax would be for logistic regression: with gram = c z z^T minimise
    tr((target - p) gram (target - p)^T)/2 + sum p target. A primal-dual interior-point method
    (Mehrotra 1992) has n_way systems of m unknowns a step. The gradient is that of one more Newton
    step from the solution, which is the implicit one (Lee et al. 2019, section 3,
    https://arxiv.org/abs/1904.03758). Own code, as qpth needs numpy < 2 and neither it nor
    cvxpylayers runs under vmap.

    Args:
        z: (m, d).
        y: (m,), classes 0..n_way-1, each present.
        n_way: number of classes.
        c: greater than 0; a larger one fits the support set more.
        steps: of the interior-point method.

    Returns:
        (n_way, d).
    """
    target, gram = indicators(y, n_way, z.dtype), c * z @ z.T  # (n_way, m), (m, m)
    with torch.no_grad():
        p, slack, shift = _interior_point(gram, target, steps)
        pull, inverse, coupling = _kkt(gram, p, slack)
    # Stationarity is the only condition that gram takes part in
    residual = (p - target) @ gram + target + shift - slack
    g = _times(inverse, -pull * residual)
    d_shift = torch.linalg.solve(coupling, g.sum(0))
    p = p + g - _times(inverse, pull * d_shift)
    return c * (target - p) @ z


def _kkt(gram: Tensor, p: Tensor, slack: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The linear system of a Newton step: (gram + slack/p) dp + d_shift = rhs, sum_class dp = 0.

    Multiplied by pull = p / (p + slack), so that no entry is large.

    Returns:
        pull (n_way, m), the inverses (n_way, m, m), and the (m, m) system for d_shift.
    """
    pull = p / (p + slack)
    inverse = _by_class(gram, 1 - pull, pull)
    return pull, inverse, (inverse * pull.unsqueeze(1)).sum(0)


def _interior_point(gram: Tensor, target: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Follows the central path p slack = mu from a feasible point to mu near rounding.

    Returns:
        p and slack (n_way, m), both above 0, and shift (m,), with
        (p - target) gram + target + shift = slack and sum_class p = 1.
    """
    smallest = torch.finfo(gram.dtype).eps ** 0.7
    spread = target - 1 / len(target)
    best = (spread * target).sum() / (spread * (spread @ gram)).sum().clamp(min=1e-30)
    p = target - best.clamp(max=1) * spread  # the best mixture of target and uniform
    slope = (p - target) @ gram + target
    lowest = slope.amin(0)
    above = (slope - lowest).mean() + 1e-3
    slack, shift = slope - lowest + above, above - lowest
    for _ in range(steps):
        pull, inverse, coupling = _kkt(gram, p, slack)
        residual = (p - target) @ gram + target + shift - slack

        def step(complementarity: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            g = _times(inverse, complementarity / (p + slack) - pull * residual)  # noqa: B023
            d_shift = torch.linalg.solve(coupling, g.sum(0) + p.sum(0) - 1)  # noqa: B023
            dp = g - _times(inverse, pull * d_shift)  # noqa: B023
            return dp, residual + dp @ gram + d_shift, d_shift  # noqa: B023

        mu = (p * slack).mean()
        dp, d_slack, _ = step(-p * slack)
        length = _to_boundary(p, dp, slack, d_slack).clamp(max=1)
        ahead = ((p + length * dp) * (slack + length * d_slack)).mean()
        aim = (mu * (ahead / mu) ** 3).clamp(min=smallest)
        dp, d_slack, d_shift = step(aim - p * slack - dp * d_slack)
        length = (0.99 * _to_boundary(p, dp, slack, d_slack)).clamp(max=1)
        p, slack, shift = p + length * dp, slack + length * d_slack, shift + length * d_shift
    return p, slack, shift


def _to_boundary(p: Tensor, dp: Tensor, slack: Tensor, d_slack: Tensor) -> Tensor:
    """The step length () at which an entry of p or slack becomes 0."""
    return 1 / torch.cat([-dp / p, -d_slack / slack]).amax().clamp(min=1e-30)
