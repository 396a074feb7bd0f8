"""The numbers of section 4 of the paper, and what they mean: optimizer, learning rate, loss."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OPTIMIZERS = ("sgd", "rmsprop")
LOSSES = ("softmax", "sigmoid")


def _number(help: str, **default: Any) -> Any:
    return dataclasses.field(metadata={"help": help}, **default)


@dataclass(frozen=True)
class Recipe:
    """How weights are changed.  The help of each field says what it is and whether the paper gives it."""

    optimizer: str = _number("optimizer", default="sgd")
    lr: float = _number("initial learning rate", default=0.045)
    momentum: float = _number("momentum", default=0.9)
    lr_decay: float = _number("factor of the learning rate at every decay", default=0.94)
    decay_epochs: float = _number("epochs from decay to decay; 0: see --decay-samples", default=2.0)
    decay_samples: int = _number("images from decay to decay, where --decay-epochs is 0", default=0)
    weight_decay: float = _number("L2 regularization of the weights, not of biases and BatchNorm", default=1e-5)
    drop_rate: float = _number("dropout before the classifier", default=0.5)
    loss: str = _number(
        "softmax: cross-entropy, of equally probable labels where there are several; sigmoid: one logistic regression "
        "per class, summed (the paper says 'multi-label' only)",
        default="softmax",
    )
    average: float = _number(
        "decay of the exponential average of the weights, min(this, (1 + n) / (10 + n)) at update n (the paper says "
        "'Polyak averaging' only)",
        default=0.9999,
    )
    rms_decay: float = _number("rmsprop: decay of the mean square (not in the paper: TensorFlow's)", default=0.9)
    rms_eps: float = _number("rmsprop: epsilon, inside the root (not in the paper: TensorFlow's)", default=1e-10)
    epochs: int = _number("epochs (not in the paper's text)", default=100)
    lr_batch: int = _number(
        "the global batch that the learning rate is for: it is multiplied by global batch / this; 0: it is not",
        default=0,
    )


RECIPES = {
    "imagenet": Recipe(),
    "jft": Recipe(
        optimizer="rmsprop",
        lr=0.001,
        lr_decay=0.9,
        decay_epochs=0,
        decay_samples=3_000_000,
        drop_rate=0.0,
        loss="sigmoid",
    ),
}


def check(recipe: Recipe) -> None:
    """Raises ``ValueError`` where a recipe makes no sense."""
    for name, known in (("optimizer", OPTIMIZERS), ("loss", LOSSES)):
        if getattr(recipe, name) not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}; got {getattr(recipe, name)!r}")
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        if not isinstance(value, str) and not value >= 0:
            raise ValueError(f"{field.name} must not be negative; got {value}")
    for name in ("momentum", "drop_rate", "average", "rms_decay"):
        if getattr(recipe, name) >= 1:
            raise ValueError(f"{name} must be less than 1; got {getattr(recipe, name)}")


def learning_rate(recipe: Recipe, epochs: float, samples: int, global_batch: int) -> float:
    """After ``epochs`` epochs and ``samples`` images: it falls in steps, not smoothly."""
    decays = 0
    if recipe.decay_epochs:
        decays = int(epochs / recipe.decay_epochs)
    elif recipe.decay_samples:
        decays = samples // recipe.decay_samples
    scale = global_batch / recipe.lr_batch if recipe.lr_batch else 1.0
    return recipe.lr * scale * recipe.lr_decay**decays


def make_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """Weight decay is for convolutions and matrices; biases and BatchNorm's vectors have one dimension."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum)
    try:
        from timm.optim import RMSpropTF
    except ImportError as error:
        raise ImportError("TensorFlow's RMSprop is timm's: pip install 'xsep[train]'") from error
    return RMSpropTF(groups, lr=recipe.lr, alpha=recipe.rms_decay, eps=recipe.rms_eps, momentum=recipe.momentum)


def make_loss(recipe: Recipe) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of logits (N, C), and of classes (N,) or of which labels an image has, (N, C) with 0 and 1."""
    return _softmax_loss if recipe.loss == "softmax" else _sigmoid_loss


def _softmax_loss(logits: Tensor, labels: Tensor) -> Tensor:
    logits = _in_full(logits)
    if labels.dim() == 2:
        labels = (labels / labels.sum(1, keepdim=True).clamp(min=1)).to(logits.dtype)
    return F.cross_entropy(logits, labels)


def _sigmoid_loss(logits: Tensor, labels: Tensor) -> Tensor:
    logits = _in_full(logits)
    if labels.dim() == 1:
        labels = F.one_hot(labels, logits.shape[1])
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="sum") / len(logits)


def _in_full(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
