"""How fast are episodes loaded, against decoding files and against collating image by image?

5-way 1-shot, 15 queries a class: 80 images of 32x32. Ours: the training loader, a gather from the
pool, uint8 as the device gets it. One core.
"""

import os
import random
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import to_tensor

from benchmarks import images
from benchmarks.harness import Worker, interleave, rate, ratio, section, table
from benchmarks.ours import parts
from pipeline.data.datamodule import EpisodicDataModule
from pipeline.engine import keep_freed_memory

TITLE = "Loading episodes"
TARGET = (
    "2,000 episodes a second on one core, as the loader gives them to the device; 100 times "
    "decoding files, 5 times image by image."
)
GOAL = 2_000
WAYS, EACH = 5, 16  # one support image and 15 queries a class
REPEATS = 7
FILES = 2_000  # drawn from by the contenders that decode
OURS = {  # episodes a batch, whether converted to float
    "ours": (4, False),
    "ours, one episode a batch": (1, False),
    "ours, and converted to float": (4, True),
}
PEERS = {  # file type, size in pixels
    "image by image from memory": (None, None),
    "80 PNG files of 32x32": ("png", None),
    "80 JPEG files of 32x32": ("jpg", None),
    "80 JPEG photos of 500x375, resized to 84x84": ("jpg", (500, 375)),
}
HEADER = ["loader", "episodes/s", "ours over it", "of the target"]

Open = Callable[[int], torch.Tensor]
"""From an image's index to a float tensor (C, H, W)."""


def one_core() -> None:
    """Bind this process, where the system lets it."""
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):  # Linux
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def data_module(meta_batch_size: int) -> EpisodicDataModule:
    """The pipeline's loader of such episodes."""
    shape = ["data.n_way=5", "data.k_shot=1", "data.n_query=15", "data.train_n_query=15"]
    size = f"data.meta_batch_size={meta_batch_size}"
    _, source = images.source()
    return parts("protonet", source, *shape, size, "data.batches_per_epoch=200")[1]


def our_step(meta_batch_size: int, convert: bool) -> Callable[[], object]:
    """Takes the next meta-batch of the training loader; runs in a worker."""
    one_core()
    keep_freed_memory()
    data = data_module(meta_batch_size)

    def endless() -> Iterator[object]:
        while True:
            for batch in data.train_dataloader():
                yield data.on_after_batch_transfer(batch, 0) if convert else batch

    return partial(next, endless())


def peer_step(suffix: str | None, photo: list[int] | None, folder: str) -> Callable[[], None]:
    """Draws classes and images, opens them one by one and stacks them; runs in a worker."""
    one_core()
    pixels, classes = some_images()
    load = save(pixels, Path(folder), suffix, photo) if suffix else lambda i: to_tensor(pixels[i])

    def step() -> None:
        chosen = [random.sample(members, EACH) for members in random.sample(classes, WAYS)]
        torch.stack([load(i) for members in chosen for i in members[:1]])
        torch.stack([load(i) for members in chosen for i in members[1:]])

    return step


def some_images() -> tuple[np.ndarray, list[list[int]]]:
    """Training images (n, H, W, C) and those of each class that has enough of them."""
    data = data_module(1)
    labels, train = data.pool.labels, data.classes("train")
    used = np.random.default_rng(0).permutation(np.flatnonzero(np.isin(labels, train)))[:FILES]
    pixels = np.ascontiguousarray(data.pool.images[used].transpose(0, 2, 3, 1))
    members = [np.flatnonzero(labels[used] == c).tolist() for c in train]
    return pixels, [rows for rows in members if len(rows) >= EACH]


def save(pixels: np.ndarray, folder: Path, suffix: str, photo: list[int] | None) -> Open:
    """Write images (n, H, W, C) as files; how to open one, a photo in miniImageNet's size."""
    folder = folder / f"{suffix}{photo}"
    folder.mkdir()
    for i, pixel in enumerate(pixels):
        image = Image.fromarray(pixel)
        image = image.resize(tuple(photo)) if photo else image
        image.save(folder / f"{i}.{suffix}", **({"quality": 95} if suffix == "jpg" else {}))

    def load(i: int) -> torch.Tensor:
        with Image.open(BytesIO((folder / f"{i}.{suffix}").read_bytes())) as image:
            return to_tensor(
                image.convert("RGB").resize((84, 84)) if photo else image.convert("RGB")
            )

    return load


def measure() -> dict[str, list[float]]:
    """Seconds of each repetition of each loader."""
    with Worker() as ours, Worker() as peers, tempfile.TemporaryDirectory() as folder:
        contenders = {}
        for name, (size, convert) in OURS.items():
            make = "benchmarks.bench_episodes:our_step"
            contenders[name] = ours.case(make, meta_batch_size=size, convert=convert)
        for name, (suffix, photo) in PEERS.items():
            make = "benchmarks.bench_episodes:peer_step"
            contenders[name] = peers.case(make, suffix=suffix, photo=photo, folder=folder)
        return interleave(contenders, REPEATS)


def main() -> str:
    """The section of the report."""
    times = measure()
    rows = []
    for name in times:
        many = OURS[name][0] if name in OURS else 1
        speed = rate(times, name, many)
        over = ratio(times, name, "ours") * OURS["ours"][0] / many
        rows.append([name, f"{speed:,.0f}", f"{over:.1f}", f"{speed / GOAL:.2f}"])
    notes = (
        f"{images.source()[0]}, 5-way 1-shot, 15 queries a class; ours uint8, as the device gets "
        "them, four episodes a batch unless said otherwise; the others float. The files lie in the "
        f"page cache. Medians of {REPEATS} interleaved repetitions."
    )
    return section(TITLE, TARGET, table(HEADER, rows), notes)


if __name__ == "__main__":
    print(main())
