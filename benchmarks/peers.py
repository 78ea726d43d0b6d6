"""What other meta-learning libraries run, in plain torch. Imports nothing of the project.

The network is that of the libraries: NCHW, eager, convolution, `nn.BatchNorm2d`, ReLU, max-pool.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WAYS = 5
WIDTH = 64
INNER_LR = 0.1
Task = tuple[Tensor, Tensor, Tensor, Tensor]
"""Support images and labels, query images and labels."""


def plain_net(channels: int, size: int, n_way: int = WAYS) -> nn.Sequential:
    """Conv4-64 and a linear head."""
    layers: list[nn.Module] = []
    for before in (channels, WIDTH, WIDTH, WIDTH):
        convolution = nn.Conv2d(before, WIDTH, 3, padding=1)
        layers += [convolution, nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.MaxPool2d(2)]
    body = nn.Sequential(*layers, nn.Flatten())
    head = nn.Linear(WIDTH * (size // 16) ** 2, n_way)
    return nn.Sequential(OrderedDict(body=body, head=head))


def random_task(channels: int, size: int, n_way: int, k_shot: int, n_query: int) -> Task:
    """Noise with labels: what a step costs does not depend on the pictures."""
    support_y = torch.arange(n_way).repeat_interleave(k_shot)
    query_y = torch.arange(n_way).repeat_interleave(n_query)
    support_x = torch.randn(len(support_y), channels, size, size)
    return support_x, support_y, torch.randn(len(query_y), channels, size, size), query_y


class Cloned(nn.Module):
    """learn2learn's mechanism and interface: clone a module, then take steps on the clone."""

    def __init__(self, module: nn.Module, lr: float, first_order: bool) -> None:
        super().__init__()
        self.module, self.lr, self.first_order = module, lr, first_order

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)

    def clone(self) -> "Cloned":
        """The same module on clones of its parameters, through which gradients flow back."""
        return Cloned(_clone(self.module), self.lr, self.first_order)

    def adapt(self, loss: Tensor) -> None:
        """One step of gradient descent on the clone."""
        parameters, second = list(self.module.parameters()), not self.first_order
        gradients = torch.autograd.grad(loss, parameters, retain_graph=second, create_graph=second)
        _descend(self.module, iter(gradients), self.lr)


def _clone(module: nn.Module) -> nn.Module:
    twin = module.__new__(type(module))
    twin.__dict__ = module.__dict__.copy()
    twin._parameters = {k: p if p is None else p.clone() for k, p in module._parameters.items()}
    twin._buffers = {k: b if b is None else b.clone() for k, b in module._buffers.items()}
    twin._modules = {k: _clone(child) for k, child in module._modules.items()}
    return twin


def _descend(module: nn.Module, gradients: Iterator[Tensor], lr: float) -> None:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = parameter - lr * next(gradients)
    for child in module._modules.values():
        _descend(child, gradients, lr)


def maml_loss(wrapped: Cloned, task: Task, steps: int) -> Tensor:
    """Query loss of a clone after `steps` steps on the support set."""
    support_x, support_y, query_x, query_y = task
    clone = wrapped.clone()
    for _ in range(steps):
        clone.adapt(F.cross_entropy(clone(support_x), support_y))
    return F.cross_entropy(clone(query_x), query_y)


def anil_loss(body: nn.Module, wrapped: Cloned, task: Task, steps: int) -> Tensor:
    """The same with one pass of the body over all images, and only the head cloned."""
    support_x, support_y, query_x, query_y = task
    z = body(torch.cat([support_x, query_x]))
    features = z[: len(support_x)], support_y, z[len(support_x) :], query_y
    return maml_loss(wrapped, features, steps)


def autocast(bf16: bool) -> AbstractContextManager[None]:
    """Mixed precision, or none."""
    return torch.autocast("cpu", torch.bfloat16, enabled=bf16)


def gradient_step(
    learner: str,
    channels: int,
    size: int,
    k_shot: int,
    steps: int,
    tasks: int,
    bf16: bool = False,
    library: bool = False,
    stacked: bool = False,
    n_query: int = 15,
) -> Callable[[], None]:
    """The meta-gradient over a meta-batch of 5-way tasks.

    Args:
        learner: maml, fomaml or anil.
        library: by learn2learn itself instead of its mechanism.
        stacked: one backward over the sum of all losses instead of one a task.
    """
    net = plain_net(channels, size)
    wrap = Cloned
    if library:
        import learn2learn

        wrap = learn2learn.algorithms.MAML
    module = net.head if learner == "anil" else net
    wrapped = wrap(module, lr=INNER_LR, first_order=learner == "fomaml")
    batch = [random_task(channels, size, WAYS, k_shot, n_query) for _ in range(tasks)]

    def loss(task: Task) -> Tensor:
        if learner == "anil":
            return anil_loss(net.body, wrapped, task, steps) / tasks
        return maml_loss(wrapped, task, steps) / tasks

    def step() -> None:
        net.zero_grad()
        with autocast(bf16):
            if stacked:
                sum(loss(task) for task in batch).backward()
                return
            for task in batch:
                loss(task).backward()

    return step


def protonet_step(
    channels: int, size: int, n_way: int, k_shot: int, n_query: int, bf16: bool = False
) -> Callable[[], None]:
    """A training step of ProtoNet on one task, as easyfsl writes it, with squared distances."""
    body = plain_net(channels, size).body
    optimizer = torch.optim.Adam(body.parameters(), lr=1e-3)
    support_x, support_y, query_x, query_y = random_task(channels, size, n_way, k_shot, n_query)

    def step() -> None:
        optimizer.zero_grad()
        with autocast(bf16):
            z = body(support_x)
            means = torch.stack([z[support_y == label].mean(0) for label in range(n_way)])
            loss = F.cross_entropy(-(torch.cdist(body(query_x), means) ** 2), query_y)
        loss.backward()
        optimizer.step()

    return step
