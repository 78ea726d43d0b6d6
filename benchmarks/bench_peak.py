"""Which share of what this machine can compute does a training step reach?

The peak is measured: a large matrix product and a large 3x3 convolution (channels last, forward).
A step's share is its FLOPs over its time, over the convolution's FLOPs over its time. FLOPs are 2 a
multiply-add of the convolutions and matrix products, counted on the plain implementation with
`FlopCounterMode`, so work that ours avoids or adds does not change them.
"""

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import ours, peers
from benchmarks.harness import here, interleave, rate, section, table
from pipeline.engine import keep_freed_memory

TITLE = "Share of the machine's peak"
TARGET = "ProtoNet in float32 at 32x32 at 40 % of the convolution peak."
REPEATS = 5
SIDE = 4096
CONVOLUTION = (64, 128, 56)  # images, channels in and out, pixels a side
PROTONET = dict(channels=3, size=32, n_way=5, k_shot=5, n_query=15)
MAML = dict(learner="maml", channels=1, size=28, k_shot=1, steps=1, tasks=4)
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
Step = Callable[[], object]


def product_step(dtype: torch.dtype) -> tuple[Step, int]:
    """A large matrix product and its FLOPs."""
    a, b, out = (torch.ones(SIDE, SIDE, dtype=dtype) for _ in range(3))
    return lambda: torch.mm(a, b, out=out), 2 * SIDE**3


def convolution_step(dtype: torch.dtype) -> tuple[Step, int]:
    """A large convolution and its FLOPs."""
    images, channels, side = CONVOLUTION
    last = torch.channels_last
    x = torch.ones(images, channels, side, side, dtype=dtype).contiguous(memory_format=last)
    weight = torch.ones(channels, channels, 3, 3, dtype=dtype).contiguous(memory_format=last)

    @torch.inference_mode()
    def step() -> Tensor:
        return torch.conv2d(x, weight, padding=1)

    return step, 2 * 9 * images * side**2 * channels**2


def flops(step: Step) -> int:
    """Of the convolutions and matrix products of a step."""
    counter = FlopCounterMode(display=False)
    with counter:
        step()
    return counter.get_total_flops()


def training_steps() -> dict[str, tuple[Step, int]]:
    """Ours, with the FLOPs of the plain implementation."""
    one = flops(peers.gradient_step(**MAML | {"tasks": 1}))
    protonet = flops(peers.protonet_step(**PROTONET))
    return {
        "ProtoNet step, float32": (ours.protonet_step(**PROTONET), protonet),
        "ProtoNet step, bf16": (ours.protonet_step(**PROTONET, bf16=True), protonet),
        "MAML step, float32": (ours.gradient_step(**MAML), one * MAML["tasks"]),
        "MAML step, bf16": (ours.gradient_step(**MAML, bf16=True), one * MAML["tasks"]),
    }


def shares(step: Step) -> list[str]:
    """Where self CPU time goes, summed over threads: convolutions, layers between them, rest."""
    everywhere = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    step()
    with profile(activities=[ProfilerActivity.CPU], experimental_config=everywhere) as recorded:
        for _ in range(5):
            step()
    spent: Counter[str] = Counter()
    for event in recorded.key_averages():
        spent[_group(event.key)] += event.self_cpu_time_total
    total = spent.total()
    return [f"{100 * spent[name] / total:.0f} %" for name in ("convolution", "layers", "rest")]


def _group(operator: str) -> str:
    name = operator.lower()
    if any(part in name for part in ("conv", "im2col", "col2im", "unfold", "aten::mm", "bmm")):
        return "convolution"
    return "layers" if any(part in name for part in ("norm", "pool", "relu", "thresh")) else "rest"


def main() -> str:
    """The section of the report."""
    keep_freed_memory()
    peaks: dict[str, tuple[Step, int]] = {}
    for name, dtype in DTYPES.items():
        peaks[f"matrix product {SIDE}x{SIDE}, {name}"] = product_step(dtype)
        peaks[f"convolution 3x3, {name}"] = convolution_step(dtype)
    steps = training_steps()
    every = peaks | steps
    times = interleave({name: here(step) for name, (step, _) in every.items()}, REPEATS)
    speed = {name: rate(times, name, count) / 1e9 for name, (_, count) in every.items()}
    rows = []
    for name, (_, count) in every.items():
        top = speed[f"convolution 3x3, {'bf16' if 'bf16' in name else 'float32'}"]
        rows.append([name, f"{count / 1e9:.1f}", f"{speed[name]:.0f}", f"{speed[name] / top:.2f}"])
    header = ["", "GFLOP", "GFLOP/s", "of the convolution"]
    where = [[name, *shares(step)] for name, (step, _) in steps.items()]
    groups = ["self CPU time", "convolutions", "norm, pool, activation", "rest"]
    notes = (
        f"{torch.get_num_threads()} threads; convolution of {CONVOLUTION[0]} images of "
        f"{CONVOLUTION[2]}x{CONVOLUTION[2]}, {CONVOLUTION[1]} channels. ProtoNet: 32x32 colour, "
        "5-way 5-shot, 15 queries. MAML: 28x28 grey, 5-way 1-shot, 15 queries, 1 step, 4 tasks. "
        "FLOPs: 2 a multiply-add of convolutions and matrix products, counted on the plain "
        f"implementation. Medians of {REPEATS} interleaved repetitions."
    )
    return section(TITLE, TARGET, table(header, rows), table(groups, where), notes)


if __name__ == "__main__":
    print(main())
