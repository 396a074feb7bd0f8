"""``python -m xsep.train.evaluate``: accuracy, or MAP@100, of weights on images with labels."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from .. import checkpoints
from ..classify import SIZE
from ..models.xception import PRESETS
from . import processes
from .data import DataError, Plan
from .evaluation import evaluate
from .splits import open_split, read_weights

_DESCRIPTION = """\
Evaluates weights of an Xception on the images of a folder: top-1 and top-5
accuracy, or with --multi-label MAP@100, of the crop in the middle.  Images
that cannot be read are named and left out.
"""

_EPILOG = """\
examples:
  python -m xsep.train.evaluate --data imagenet --weights run/checkpoint-000100000/*.safetensors
  torchrun --nproc-per-node 8 -m xsep.train.evaluate --data imagenet --weights xception.safetensors
"""


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        joined = processes.start(options.device)
        model, _ = checkpoints.build(options.weights[0], options.preset)
        split = open_split(options.data, options.split, options.multi_label)
        weights = read_weights(options.class_weights, split.classes) if options.class_weights else None
        plan = Plan(options.batch_size, 1, options.size, options.workers, 0, joined.rank, joined.world)
        for file in options.weights:
            checkpoints.load(model, file, options.preset)
            if model.num_classes != len(split.classes):
                raise ValueError(f"{file}: {model.num_classes} classes, but {len(split.classes)} in {options.data}")
            model.to(joined.device).to(memory_format=torch.channels_last)
            scores = evaluate(model, split, plan, joined, weights)
            if joined.rank == 0:
                print(json.dumps({"weights": str(file), **scores}), flush=True)
    except (OSError, ValueError, ImportError, DataError) as error:
        parser.error(str(error))
    processes.finish()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m xsep.train.evaluate",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="as for python -m xsep.train")
    parser.add_argument("--split", default="val", help="the part of it to evaluate on (default: val)")
    parser.add_argument(
        "--weights", type=Path, required=True, nargs="+", metavar="FILE", help="weights, evaluated one after the other"
    )
    parser.add_argument("--multi-label", action="store_true", help="images have several labels: MAP@100")
    add_class_weights(parser)
    parser.add_argument("--preset", choices=sorted(PRESETS), help="as for python -m xsep.classify")
    parser.add_argument("--batch-size", type=positive, default=32, metavar="N", help="of each process (default: 32)")
    parser.add_argument("--size", type=positive, default=SIZE, metavar="PIXELS", help=f"default: {SIZE}")
    parser.add_argument("--workers", type=natural, default=4, metavar="N", help="that load images (default: 4)")
    parser.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    return parser


def add_class_weights(parser: Any) -> None:
    parser.add_argument(
        "--class-weights",
        type=Path,
        metavar="FILE",
        help="lines of a class and its weight in MAP@100 (default: all weigh the same)",
    )


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {value}")
    return value


def natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative; got {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())
