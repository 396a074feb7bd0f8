"""``python -m xsep.train``: an Xception trained as in the paper."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from ..classify import SIZE
from ..models import xception
from . import processes
from .data import DataError
from .evaluate import add_class_weights, natural, positive
from .loop import AMP, Diverged, Options, fit
from .recipes import LOSSES, OPTIMIZERS, RECIPES, Recipe, check
from .splits import open_split, read_weights

_DESCRIPTION = """\
Trains an Xception as in section 4 of the paper (arXiv:1610.02357), on one
process or on all that torchrun starts.

DIR holds the images to train on, and if there are any, those to evaluate on
after every epoch, under the names train and val, each in one of these forms:
  train/CLASS/*.jpg  one folder per class
  train/*.tar        WebDataset's shards, of NAME.jpg and NAME.cls
  train.txt          lines of a file and its labels (several labels an image)
classes.txt, with a class on every line, orders them; shards need it.
"""

_EPILOG = """\
SIGTERM and Ctrl-C save a checkpoint and end; --resume goes on from there.

exit status:
  0; 1 when the last checkpoint could not be saved or the weights diverged;
  2 when something is wrong with the data or the arguments; 128 plus its number
  after a signal

examples:
  python -m xsep.train --data imagenet --output run
  python -m xsep.train --data imagenet --output run --resume --amp bf16
  torchrun --nproc-per-node 8 -m xsep.train --data photos --recipe jft --output run
"""


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    given = vars(parser.parse_args(arguments))
    # DDP takes the gradients of depthwise filters for another layout, where a dimension of 1 has another stride.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    try:
        try:
            import safetensors  # noqa: F401
            import torchvision  # noqa: F401
            import tqdm  # noqa: F401
        except ImportError as error:
            raise ImportError(f"training needs more packages: pip install 'xsep[train]': {error}") from error
        recipe = make_recipe(given)
        check(recipe)
        joined = processes.start(given["device"])
        multi_label = given["recipe"] == "jft" if given["multi_label"] is None else given["multi_label"]
        train = open_split(given["data"], "train", multi_label)
        validation = None
        if any((given["data"] / name).exists() for name in ("val", "val.txt")):
            validation = open_split(given["data"], "val", multi_label, train.classes)
        weights = read_weights(given["class_weights"], train.classes) if given["class_weights"] else None
        options = Options(**{field.name: given[field.name] for field in dataclasses.fields(Options)})
        torch.manual_seed(options.seed)
        model = xception(
            num_classes=len(train.classes),
            drop_rate=recipe.drop_rate,
            residual=given["residual"],
            activation=given["activation"],
            fc_layers=given["fc_layers"],
            fused=given["fused"],
        )
        joined.say(
            f"{train.count} images of {len(train.classes)} classes, "
            f"{validation.count if validation else 'none'} to evaluate on; {joined.world} x {joined.device.type}"
        )
        status = fit(model, train, validation, recipe, options, joined, weights)
    except (OSError, ValueError, ImportError, DataError, Diverged) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr, flush=True)
        return 1 if isinstance(error, Diverged) else 2
    processes.finish()
    return status


def make_recipe(given: dict[str, Any]) -> Recipe:
    """The one that ``recipe`` names, with what else is given."""
    named = {field.name: given[field.name] for field in dataclasses.fields(Recipe)}
    return dataclasses.replace(RECIPES[given["recipe"]], **{k: v for k, v in named.items() if v is not None})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m xsep.train",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="see above")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="for checkpoints, training.csv and evaluation.csv"
    )
    parser.add_argument("--recipe", choices=sorted(RECIPES), default="imagenet", help="default: imagenet")
    parser.add_argument(
        "--multi-label",
        action=argparse.BooleanOptionalAction,
        help="images have several labels: evaluates MAP@100 (default: with --recipe jft)",
    )
    add_class_weights(parser)
    parser.add_argument("--resume", action="store_true", help="continue the training in --output, if there is one")
    _add_model(parser.add_argument_group("model"))
    _add_run(parser.add_argument_group("run"))
    _add_recipe(parser.add_argument_group("numbers of the recipe", "defaults are imagenet's / jft's"))
    return parser


def _add_model(group: Any) -> None:
    switch = argparse.BooleanOptionalAction
    group.add_argument("--model", choices=["xception"], default="xception", help="default: xception")
    group.add_argument("--residual", action=switch, default=True, help="figure 9 compares")
    group.add_argument(
        "--activation", choices=["relu", "elu"], help="between depthwise and pointwise; figure 10 compares"
    )
    group.add_argument(
        "--fc-layers", type=natural, default=0, metavar="N", help="of 4096 units; table 2 compares 0 and 2 (default: 0)"
    )
    group.add_argument("--fused", action=switch, default=True, help="store less of what backward needs")


def _add_run(group: Any) -> None:
    switch = argparse.BooleanOptionalAction
    default = {field.name: field.default for field in dataclasses.fields(Options)}
    numbers = {
        "batch_size": (positive, "images at a time in each process"),
        "accumulate": (positive, "batches of each process in a step"),
        "size": (positive, "pixels of the images' sides"),
        "workers": (natural, "that load images, of each process"),
        "seed": (natural, "of weights, order, crops and dropout"),
        "save_steps": (positive, "steps from checkpoint to checkpoint; one is saved after every epoch, too"),
        "keep": (positive, "checkpoints to keep"),
        "log_steps": (positive, "steps from line to line of training.csv"),
    }
    for name, (kind, text) in numbers.items():
        value = 4 if name == "workers" else SIZE if name == "size" else default[name]
        group.add_argument(_flag(name), type=kind, default=value, metavar="N", help=f"{text} (default: {value})")
    group.add_argument("--max-steps", type=positive, metavar="N", help="stop after so many in all, as after a signal")
    group.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    group.add_argument("--amp", choices=sorted(AMP), help="mixed precision (default: float32 only)")
    group.add_argument("--channels-last", action=switch, default=True, help="NHWC in place of NCHW")
    group.add_argument("--sync-bn", action="store_true", help="BatchNorm over the batches of all processes")
    group.add_argument(
        "--asynchronous",
        action="store_true",
        help="a process updates the weights when it has gradients, and waits for none (the paper's JFT runs)",
    )


def _add_recipe(group: Any) -> None:
    choices = {"optimizer": OPTIMIZERS, "loss": LOSSES}
    for field in dataclasses.fields(Recipe):
        values = [getattr(RECIPES[name], field.name) for name in ("imagenet", "jft")]
        shown = " / ".join(str(value) for value in dict.fromkeys(values))
        kind = type(values[0])
        group.add_argument(
            _flag(field.name),
            type=kind,
            choices=choices.get(field.name),
            metavar=None if field.name in choices else "N" if kind is int else "X",
            help=f"{field.metadata['help']} (default: {shown})",
        )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


if __name__ == "__main__":
    sys.exit(main())
