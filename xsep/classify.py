"""``python -m xsep.classify``: what an Xception sees in photographs."""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path
from typing import Any, BinaryIO, Iterable, Iterator, NamedTuple

import torch
from torch import Tensor

from . import checkpoints
from .models import Xception
from .models.xception import PRESETS

SIZE = 299
CROP = 0.8975  # of the shorter side: what the published accuracies were measured with

_DESCRIPTION = """\
Classifies photographs with the weights of an Xception: prints the most probable
classes of each.

Weights are files of timm (.pth), Keras (.h5, .weights.h5, .keras) or xsep
(.safetensors, .pth).  A photograph is turned upright as its EXIF says, resized
with bicubic interpolation until its shorter side is 333 pixels, cropped to the
299 x 299 in the middle, and scaled to [-1, 1], as the public weights need it.
"""

_EPILOG = """\
exit status:
  0; 1 when an image could not be read, which standard error names while the
  others are done; 2 when none was tried, since the weights, the labels or the
  arguments are wrong

examples:
  python -m xsep.classify cat.jpg dog.png --weights xception-43020ad28.pth
  python -m xsep.classify photographs/ --weights xception.h5 --json > found.json
  cat cat.jpg | python -m xsep.classify - --weights xception.safetensors
"""


class Prediction(NamedTuple):
    """A class of an image, by its number from 0, with its name."""

    number: int
    label: str
    probability: float


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        from torchvision import transforms  # noqa: F401
    except ImportError as error:
        parser.error(f"photographs need torchvision and Pillow: {error}")
    try:
        model, loaded = checkpoints.build(options.weights, options.preset)
        if not model.num_classes:
            raise ValueError(f"{options.weights}: no classifier of Xception's in it, but {_listed(loaded.left_out)}")
        if model.in_chans != 3:
            raise ValueError(f"{options.weights}: for images of {model.in_chans} channels, not of 3")
        labels = read_labels(options.labels, model.num_classes)
        model.eval().to(options.device)
    except (OSError, ValueError, ImportError, RuntimeError, AssertionError) as error:  # the last of torch without CUDA
        parser.error(str(error))

    failures: list[str] = []
    results = []
    for names, images in _batches(_images(options.image, failures), options.batch_size):
        for name, predictions in zip(names, classify(model, images, labels, options.top)):
            results.append({"image": name, "predictions": [prediction._asdict() for prediction in predictions]})
            if not options.json:
                print(table(name, predictions), flush=True)
    if options.json:
        print(json.dumps(results, indent=1))
    return 1 if failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m xsep.classify",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "image", nargs="+", help="a photograph, a folder to search for them, or - for one on standard input"
    )
    parser.add_argument("--weights", required=True, type=Path, metavar="FILE", help="a checkpoint with its classifier")
    parser.add_argument(
        "--labels",
        type=Path,
        metavar="FILE",
        help="names of the classes in order: a text file with one a line, a JSON list, or Keras's "
        "imagenet_class_index.json (default: their numbers from 0)",
    )
    parser.add_argument("--top", type=_positive, default=5, metavar="N", help="classes to print (default: 5)")
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    parser.add_argument(
        "--preset",
        choices=sorted(PRESETS),
        help="constants that the weights were trained with (default: keras for Keras's files, what xsep recorded in "
        "its own, timm for others)",
    )
    parser.add_argument("--batch-size", type=_positive, default=8, metavar="N", help="images at a time (default: 8)")
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="of torch (default: cuda where there is one, else cpu)",
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {value}")
    return value


def _listed(names: list[str]) -> str:
    return f"another head: {', '.join(names)}" if names else "the base only"


def read_labels(file: Path | None, num_classes: int) -> list[str]:
    """The names of the classes; without a file their numbers."""
    if file is None:
        return [str(i) for i in range(num_classes)]
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not a text in UTF-8") from error
    if file.suffix == ".json":
        try:
            labels = _labels_of_json(json.loads(text))
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{file}: neither a list of names nor an object with a name for 0, 1, 2, ...") from error
    else:
        labels = text.splitlines()
    if len(labels) != num_classes:
        raise ValueError(f"{file}: {len(labels)} names for {num_classes} classes")
    return labels


def _labels_of_json(found: Any) -> list[str]:
    """Of a list, or of an object whose values are names or end in one: Keras's are a WordNet number and a name."""
    values = found if isinstance(found, list) else [found[str(i)] for i in range(len(found))]
    labels = [value[-1] if isinstance(value, list) else value for value in values]
    if not all(isinstance(label, str) for label in labels):
        raise TypeError("a name is no text")
    return labels


def _images(arguments: Iterable[str], failures: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Name and pixels of each image; one that cannot be read is named on standard error and in ``failures``."""
    for argument in arguments:
        path = Path(argument)
        try:
            if argument == "-":
                files: list[tuple[str, Any]] = [("standard input", io.BytesIO(sys.stdin.buffer.read()))]
            elif path.is_dir():
                files = [(str(found), found) for found in images_in(path)]
            else:
                files = [(argument, path)]
        except OSError as error:
            files = []
            _report(argument, error, failures)
        for name, file in files:
            try:
                image = read_image(file)
            except Exception as error:  # decoders raise what they like: OSError, SyntaxError, struct.error, ...
                _report(name, error, failures)
            else:
                yield name, image


def _report(name: str, error: Exception, failures: list[str]) -> None:
    failures.append(name)
    print(f"cannot read {name}: {error}", file=sys.stderr, flush=True)


def images_in(folder: Path) -> list[Path]:
    """The files in a folder and those below whose names end as images' do; ``FileNotFoundError`` if there are none."""
    from PIL import Image

    endings = set(Image.registered_extensions())
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in endings and path.is_file())
    if not found:
        raise FileNotFoundError("no image in this folder")
    return found


def read_image(file: Path | BinaryIO) -> Tensor:
    """(3, 299, 299) in [-1, 1]."""
    from PIL import Image, ImageOps
    from torchvision import transforms
    from torchvision.transforms.functional import InterpolationMode

    with Image.open(file) as opened:
        if max(opened.size) > 100 * min(opened.size):
            raise ValueError(f"{opened.size[0]} x {opened.size[1]} pixels are a line, which resized would be too long")
        image = ImageOps.exif_transpose(opened).convert("RGB")
    prepare = transforms.Compose(
        [
            transforms.Resize(int(SIZE / CROP), InterpolationMode.BICUBIC),
            transforms.CenterCrop(SIZE),
            transforms.ToTensor(),
            transforms.Normalize((0.5,) * 3, (0.5,) * 3),
        ]
    )
    return prepare(image)


def _batches(images: Iterable[tuple[str, Tensor]], size: int) -> Iterator[tuple[list[str], Tensor]]:
    names: list[str] = []
    tensors: list[Tensor] = []
    for name, tensor in images:
        names.append(name)
        tensors.append(tensor)
        if len(names) == size:
            yield names, torch.stack(tensors)
            names, tensors = [], []
    if names:
        yield names, torch.stack(tensors)


@torch.inference_mode()
def classify(model: Xception, images: Tensor, labels: list[str], top: int = 5) -> list[list[Prediction]]:
    """The most probable classes of each of (N, 3, 299, 299) images, the first being the most probable."""
    device = next(model.parameters()).device
    probabilities = model(images.to(device, memory_format=torch.channels_last)).softmax(1).cpu()
    best = probabilities.topk(min(top, len(labels)), dim=1)
    return [
        [Prediction(i, labels[i], probability) for i, probability in zip(indices, values)]
        for indices, values in zip(best.indices.tolist(), best.values.tolist())
    ]


def table(name: str, predictions: list[Prediction]) -> str:
    lines = [f"  {100 * prediction.probability:6.2f} %  {prediction.label}" for prediction in predictions]
    return "\n".join([name, *lines])


if __name__ == "__main__":
    sys.exit(main())
