"""How fast is a training step of ProtoNet against the plain eager one?

Forward, backward and Adam step of one task, Conv4-64 with running batch norm. Peers: NCHW,
convolution, `nn.BatchNorm2d`, ReLU, max-pool; support set and queries in two passes and a loop over
classes for the prototypes, as easyfsl does.
"""

from benchmarks.harness import Times, Worker, interleave, rate, ratio, section, table

TITLE = "ProtoNet: a training step"
TARGET = "1.5 times the plain eager step."
REPEATS = 9
TASKS = {
    "32x32 colour, 5-way 5-shot, 15 queries": dict(
        channels=3, size=32, n_way=5, k_shot=5, n_query=15
    ),
    "28x28 grey, 20-way 1-shot, 5 queries": dict(
        channels=1, size=28, n_way=20, k_shot=1, n_query=5
    ),
}
PRECISIONS = {"float32": (False, False), "bf16; peers float32": (True, False), "bf16": (True, True)}
HEADER = ["task", "ours, steps/s", "peers, steps/s", "ratio", "lowest-highest"]


def row(label: str, times: Times) -> list[str]:
    """Rates by the median repetition, ratio by the median over neighbouring repetitions."""
    each = [p / o for p, o in zip(times["peers"], times["ours"], strict=True)]
    return [
        label,
        f"{rate(times, 'ours'):.1f}",
        f"{rate(times, 'peers'):.1f}",
        f"**{ratio(times, 'peers', 'ours'):.2f}**",
        f"{min(each):.2f}-{max(each):.2f}",
    ]


def main() -> str:
    """The section of the report."""
    rows = []
    with Worker() as ours, Worker() as peers:
        for task, shape in TASKS.items():
            for precision, (our_bf16, their_bf16) in PRECISIONS.items():
                contenders = {
                    "ours": ours.case("benchmarks.ours:protonet_step", bf16=our_bf16, **shape),
                    "peers": peers.case("benchmarks.peers:protonet_step", bf16=their_bf16, **shape),
                }
                rows.append(row(f"{task}; {precision}", interleave(contenders, REPEATS)))
    notes = f"One task a step. Medians of {REPEATS} interleaved repetitions."
    return section(TITLE, TARGET, table(HEADER, rows), notes)


if __name__ == "__main__":
    print(main())
