"""Pure maths of few-shot learning. Floor 0: torch only, no state, one task at a time."""

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Params = dict[str, Tensor]
Aux = TypeVar("Aux")


def count_ways(support_y: Tensor) -> int:
    """n_way of a support set: its largest label plus one; of real targets their number.

    Raises:
        ValueError: if a class of 0..n_way-1 has no support image.
    """
    if support_y.is_floating_point():
        return support_y.shape[-1]
    n_way = int(support_y.max()) + 1
    missing = (torch.bincount(support_y, minlength=n_way) == 0).nonzero().flatten().tolist()
    if missing:
        raise ValueError(f"support set: no image of class {missing[0]} of 0..{n_way - 1}")
    return n_way


def prototypes(support_z: Tensor, support_y: Tensor, n_way: int) -> Tensor:
    """Mean embedding of each class; classes may hold different numbers of images.

    Snell, Swersky, Zemel 2017, eq. 1, https://arxiv.org/abs/1703.05175.

    Args:
        support_z: (m, d).
        support_y: (m,), classes 0..n_way-1, each present.
        n_way: number of classes.

    Returns:
        (n_way, d).
    """
    classes = torch.arange(n_way, device=support_y.device)
    member = (support_y.unsqueeze(1) == classes).to(support_z.dtype)  # (m, n_way)
    return (member.T @ support_z) / member.sum(0).unsqueeze(1)


def principal_components(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k directions in which points vary most (Pearson 1901).

    Args:
        z: (m, d).

    Returns:
        Coordinates (m, k) along them, each direction turned so that its largest coordinate in
        absolute value is positive, and the shares (k,) of the variance, of which the rest is lost.
        Both are 0 for directions that there are not.
    """
    centred = z.double() - z.double().mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    points = F.pad(u * s, (0, max(0, k - len(s))))[:, :k]
    largest = points.gather(0, points.abs().argmax(0, keepdim=True))
    variance = F.pad(s.square(), (0, max(0, k - len(s))))
    total = variance.sum().clamp(min=torch.finfo(variance.dtype).tiny)
    return (points * torch.where(largest < 0, -1, 1)).to(z.dtype), variance[:k] / total


def canonical_order(support_z: Tensor, support_y: Tensor) -> Tensor:
    """An order of the support set that does not depend on the one it came in.

    For learners that read it as a sequence: by class, then by the sum of the embedding.

    Args:
        support_z: (..., m, d).
        support_y: (..., m).

    Returns:
        (..., m) indices.
    """
    by_sum = support_z.sum(-1).argsort(-1)
    by_class = support_y.gather(-1, by_sum).argsort(dim=-1, stable=True)
    return by_sum.gather(-1, by_class)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared Euclidean distance of every row of a to every row of b: (m, d), (n, d) -> (m, n)."""
    with torch.autocast(a.device.type, enabled=False):  # the difference cancels in half precision
        a, b = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (a, b))
        return a.square().sum(1, keepdim=True) - 2 * a @ b.T + b.square().sum(1)


def nearest_mean(support_z: Tensor, support_y: Tensor, n_way: int) -> Callable[[Tensor], Tensor]:
    """Classify by squared distance to the mean embedding of each class.

    Snell, Swersky, Zemel 2017, eq. 1-2.

    Args:
        support_z: (m, d).
        support_y: (m,), classes 0..n_way-1, each present.
        n_way: number of classes.

    Returns:
        From query embeddings (q, d) to logits (q, n_way), minus the squared distances.
    """
    means = prototypes(support_z, support_y, n_way)  # (n_way, d)
    return lambda query_z: -squared_distances(query_z, means)


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """Share of rows whose largest logit is at y: (..., m, n), (..., m) -> (...)."""
    return (logits.argmax(-1) == y).float().mean(-1)


Loss = Literal["cross_entropy", "binary_cross_entropy", "mse"]


def query_loss(loss: Loss, logits: Tensor, y: Tensor) -> Tensor:
    """Loss of each query: (..., m, n) and (..., m) classes or (..., m, n) targets -> (..., m).

    Args:
        loss: cross_entropy takes classes; binary_cross_entropy (each class against the rest) and
            mse are means over the n outputs, and turn classes into one-hot targets.
    """
    if loss == "cross_entropy":
        return F.cross_entropy(logits.movedim(-1, min(1, logits.dim() - 1)), y, reduction="none")
    target = y if y.dtype.is_floating_point else F.one_hot(y, logits.shape[-1]).to(logits.dtype)
    if loss == "mse":
        return (logits - target).square().mean(-1)
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(-1)


def score(logits: Tensor, y: Tensor) -> Tensor:
    """What tasks are scored by: (..., m, n) and (..., m) classes or (..., m, n) targets -> (...).

    The accuracy of classes in 0..1, the mean squared error of real targets; to report, not to
    differentiate.
    """
    if y.is_floating_point():
        return query_loss("mse", logits.detach(), y).mean(-1)
    return accuracy(logits, y)


def plain_autograd() -> bool:
    """Whether neither a transform of torch.func nor torch.compile is at work."""
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    return not transformed and not torch.compiler.is_compiling()


def gradient(loss: Callable[[Params], tuple[Tensor, Aux]], at: Params) -> tuple[Params, Aux]:
    """Gradient of a scalar, differentiable again in whatever part of `at` is being differentiated.

    `torch.func.grad`, which may be nested, stacked by vmap and used under `inference_mode`; outside
    of these the same by `autograd.grad`, as every operator passes through fewer layers: a tenth to
    a fifth of a meta-gradient's time on a CPU.

    Args:
        loss: gives the scalar, and what else the caller wants of the computation.

    Returns:
        The gradient, same keys as `at`; what else `loss` gave, detached by the caller if need be.
    """
    if not plain_autograd() or torch.is_inference_mode_enabled():
        return torch.func.grad(loss, has_aux=True)(at)
    again = torch.is_grad_enabled() and any(v.requires_grad for v in at.values())
    if not again:
        at = {k: v.detach().requires_grad_() for k, v in at.items()}
    with torch.enable_grad():
        value, aux = loss(at)
    inputs = list(at.values())
    parts = torch.autograd.grad(value, inputs, create_graph=again, materialize_grads=True)
    return dict(zip(at, parts, strict=True)), aux


def hessian(loss: Callable[[Params], Tensor], at: Params) -> Callable[[Params], Params]:
    """The Hessian of a scalar at a point, as its product with vectors (Pearlmutter 1994).

    The gradient is computed once and its graph is kept; a product is one backward pass through it.
    The result is a constant.
    """
    at = {k: v.detach() for k, v in at.items()}
    times = torch.func.vjp(torch.func.grad(loss), at)[1]
    return lambda v: {k: x.detach() for k, x in times(v)[0].items()}  # symmetric: vH = Hv


def conjugate_gradient(times: Callable[[Params], Params], b: Params, steps: int) -> Params:
    """Solve A x = b for symmetric A from x = 0: Hestenes, Stiefel 1952.

    Every step is exact in one more direction. It ends early where A is not positive, as a truncated
    Newton step does (Steihaug 1983), or nothing is left to solve; no step depends on a value in
    Python, so tasks may be stacked.

    Args:
        times: A, as its product with a vector.
        steps: products with A.

    Returns:
        x, same keys as b.
    """
    x = {k: torch.zeros_like(v) for k, v in b.items()}
    residual, direction, square = b, b, _dot(b, b)
    going = square > 0
    for _ in range(steps):
        image = times(direction)
        curvature = _dot(direction, image)
        going = going & (curvature > 0)
        rate = torch.where(going, square / curvature, 0)
        x = {k: v + rate * direction[k] for k, v in x.items()}
        residual = {k: v - rate * image[k] for k, v in residual.items()}
        before, square = square, _dot(residual, residual)
        mixing = torch.where(going, square / before, 0)
        direction = {k: v + mixing * direction[k] for k, v in residual.items()}
    return x


def _dot(a: Params, b: Params) -> Tensor:
    return torch.stack([(v * b[k]).sum() for k, v in a.items()]).sum()


class MeanInterval(NamedTuple):
    """A mean over episodes and the half width of its interval, in the unit of the values."""

    mean: float
    ci95: float


def mean_ci95(values: Tensor) -> MeanInterval:
    """Mean and 95 % normal-approximation half width, 1.96 s / sqrt(n), of values (n,).

    s is the sample deviation (n - 1). One value has no interval: ci95 is nan.
    """
    values = values.cpu().double()  # Apple GPUs have no float64
    deviation = values.std(correction=1) if len(values) > 1 else torch.tensor(float("nan"))
    return MeanInterval(values.mean().item(), (1.96 * deviation / len(values) ** 0.5).item())
