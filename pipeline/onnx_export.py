"""A photo classifier as one file that needs neither this package nor PyTorch. Floor 4."""

import copy
import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.calibration import conformal_p
from pipeline.classifier import PhotoClassifier, scores
from pipeline.errors import UserError
from pipeline.learners.embedding import EmbeddingLearner

OPSET = 18  # the first whose Resize smooths before it shrinks, as the networks' own resizing does
TOLERANCE = 1e-4  # between the file's probabilities and the module's; of scores, relative
INSTALL = "ONNX needs further packages: pip install '.[onnx]'"


class _Answers(nn.Module):
    """uint8 photos (n, C, S, S) -> probabilities (n, classes) and scores (n,)."""

    def __init__(self, classifier: PhotoClassifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, photos: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.classifier(photos)
        return logits.softmax(1), scores(logits)


def export_onnx(classifier: PhotoClassifier, path: Path) -> float:
    """Write a classifier as an ONNX file, once the file is found to say what the module says.

    Its input `photos` is uint8 (n, C, S, S), for any n; preprocessing is within. Its outputs are
    `probabilities` (n, classes) and `score` (n,), the largest logit. Class names, temperature,
    the score below which a photo looks like none of the classes, and how photos are cut to S are
    in the file's properties (`metadata_props`). It holds no photo.

    Returns:
        The largest difference of a probability, below `TOLERANCE`, on random and support photos.

    Raises:
        UserError: if the learner is none that can be exported, packages are missing, or the file
            differs; nothing is written then.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  # torch.onnx imports it late, and names no package then
    except ImportError as error:
        raise UserError(f"{INSTALL} ({error.name} is missing)") from error
    module, program = _program(classifier)
    with _quiet("ONNX"):
        written = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=["photos"],
            output_names=["probabilities", "score"],
            verbose=False,
        )
        assert written is not None
        proto = written.model_proto
        onnx.helper.set_model_props(proto, properties(classifier))
        onnx.checker.check_model(proto)
        data = proto.SerializeToString()
        session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
        photos = classifier.support
        run = partial(session.run, None)
        difference = _difference(module, lambda x: run({"photos": x.numpy()}), photos, "ONNX")
    path.write_bytes(data)
    return difference


def export_program(classifier: PhotoClassifier, path: Path) -> float:
    """The same as a program of torch.export (.pt2), read back and compared.

    It runs wherever PyTorch does, without this package: `torch.export.load(path).module()`.

    Returns:
        See `export_onnx`.

    Raises:
        UserError: see `export_onnx`.
    """
    module, program = _program(classifier)
    with _quiet("torch.export"):
        torch.export.save(program, path)
        loaded = torch.export.load(path).module()
    try:
        said = partial(map, Tensor.numpy)
        return _difference(module, lambda x: said(loaded(x)), classifier.support, "torch.export")
    except UserError:
        path.unlink()
        raise


def properties(classifier: PhotoClassifier) -> dict[str, str]:
    """What a program has to know to use the file, as text.

    `reject_below` is a score, or empty if no photo is ever said to look like none of the classes.
    """
    channels, size, _ = classifier.image_shape
    below = reject_below(classifier)
    mode = "RGB" if channels == 3 else "grey"
    return {
        "class_names": json.dumps(classifier.class_names, ensure_ascii=False),
        "temperature": repr(classifier.temperature),
        "reject_below": "" if below is None else repr(below),
        "preprocessing": f"upright by EXIF, transparency on white, {mode}, shorter side resized "
        f"(bicubic) and centre cropped to {size}x{size}, planes in the order C, H, W; uint8 0..255",
        **{k: str(v) for k, v in classifier.provenance.items()},
    }


def reject_below(classifier: PhotoClassifier) -> float | None:
    """The score below which `PhotoClassifier.predict` rejects; None if it rejects nothing."""
    known = classifier.known_scores
    if not classifier.can_reject:
        return None
    kept = torch.from_numpy(conformal_p(known, known) > classifier.reject)
    return float(known.cpu()[kept].min()) if kept.any() else float("inf")


def _program(classifier: PhotoClassifier) -> tuple[_Answers, torch.export.ExportedProgram]:
    """The module on the CPU, and what torch.export makes of it for any number of photos."""
    learner = classifier.learner
    if not isinstance(learner, EmbeddingLearner) or learner.protocol != "inductive":
        raise UserError(
            f"export: {learner.label} ({learner.protocol}) cannot be exported; learners that "
            "compare embeddings, each photo by itself, can (protonet, frozen)"
        )
    own = copy.deepcopy(classifier)
    own._adapted = None
    module = _Answers(own.cpu().eval())
    example = torch.zeros(2, *own.image_shape, dtype=torch.uint8)
    with torch.no_grad(), _quiet("torch.export"):
        module(example)  # adapts, and fills caches that tracing must not fill
        own.support = own.support[:0].clone()  # adapted, it needs no photo: none is in the file
        shapes = {"photos": {0: torch.export.Dim("n", min=1)}}
        program = torch.export.export(module, (example,), dynamic_shapes=shapes)
    if any("_batch_dim" in str(node.target) for node in program.graph.nodes):
        # torch 2.15 fails on it later, and leaves vmap's state behind, which breaks what follows
        raise UserError(f"export: {learner.label} classifies by vmap, which cannot be exported")
    return module, program


@contextmanager
def _quiet(what: str) -> Iterator[None]:
    """Without warnings of libraries among themselves; what they cannot do is told in one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # exporters raise a dozen kinds
            cause: BaseException = error
            while cause.__cause__ is not None:  # the first of them says what it is about
                cause = cause.__cause__
            reason = (str(cause).strip() or type(cause).__name__).splitlines()[0][:160]
            raise UserError(f"export: {what} cannot express this learner ({reason})") from error


@torch.inference_mode()
def _difference(
    module: _Answers, file: Callable[[Tensor], Iterable[np.ndarray]], photos: Tensor, what: str
) -> float:
    """The largest difference of a probability, on support and random photos, many and one.

    Raises:
        UserError: if it, or that of a score, is above `TOLERANCE`.
    """
    random = np.random.default_rng(0).integers(0, 256, (7, *photos.shape[1:]), np.uint8)
    many = torch.cat([photos[:64].cpu(), torch.from_numpy(random)])
    differences = []
    for x in (many, many[:1]):
        expected = [each.numpy() for each in module(x)]
        p, score = (np.abs(a - b) for a, b in zip(file(x), expected, strict=True))
        relative = score / np.maximum(1, np.abs(expected[1]))
        if not (p.max() <= TOLERANCE and relative.max() <= TOLERANCE):
            raise UserError(
                f"export: the {what} file would differ by {p.max():.2g} in a probability and "
                f"{relative.max():.2g} in a score, more than {TOLERANCE:g}; not kept"
            )
        differences.append(float(p.max()))
    return max(differences)
