"""The training loop: any module, any number of processes, stopped and continued at any step."""

from __future__ import annotations

import dataclasses
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import _compat
from ..nn import SyncBatchNorm2d
from . import logs, recipes, state
from .averaging import Average
from .data import Images, Plan, batches
from .evaluation import evaluate, prepare
from .processes import Processes
from .recipes import Recipe
from .splits import Split
from .stopping import Stop

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Options:
    """Where a training runs and what it leaves; with ``Recipe`` all there is to choose."""

    output: Path
    batch_size: int = 32
    accumulate: int = 1
    size: int = 299
    workers: int = 0
    seed: int = 0
    amp: str | None = None
    channels_last: bool = True
    sync_bn: bool = False
    asynchronous: bool = False
    resume: bool = False
    save_steps: int = 1000
    keep: int = 2
    log_steps: int = 10
    max_steps: int | None = None


class Diverged(Exception):
    """The weights are no numbers any more."""


@dataclass
class Progress:
    """How far a training is.  ``seen`` are the images of the epoch that it is in."""

    epoch: int = 0
    seen: int = 0
    step: int = 0
    samples: int = 0


def fit(
    model: nn.Module,
    train: Split,
    validation: Split | None,
    recipe: Recipe,
    options: Options,
    joined: Processes | None = None,
    class_weights: Tensor | None = None,
) -> int:
    """Trains ``model`` in place.  Returns the exit status.

    That is 0 when all is done and saved, 1 when the last checkpoint could not be saved, and 128 plus the number of the
    signal that stopped it.  Every process of a training calls it with the same arguments, and the same initial weights.

    Raises:
        ValueError: a recipe or options that make no sense, or a checkpoint that does not fit.
        FileExistsError: there are checkpoints, and ``resume`` is not set.
        DataError: there is too little data, or it cannot be read any more.
        Diverged: the weights became infinite or NaN; they are not saved.
    """
    joined = joined or Processes()
    for name, bad in (("sync_bn", options.sync_bn), ("amp", options.amp == "fp16")):
        if options.asynchronous and bad:
            raise ValueError(
                f"asynchronous: processes do not wait for each other, as {name} {getattr(options, name)} would need"
            )
    kind: type[Training] = Training
    if options.asynchronous and joined.world > 1:
        from .asynchronous import AsynchronousTraining

        kind = AsynchronousTraining
    return kind(model, train, validation, recipe, options, joined, class_weights).run()


class Training:
    """One training in this process; ``joined.world`` of them step together."""

    def __init__(
        self,
        model: nn.Module,
        train: Split,
        validation: Split | None,
        recipe: Recipe,
        options: Options,
        joined: Processes,
        class_weights: Tensor | None,
    ):
        recipes.check(recipe)
        self.train, self.validation, self.recipe, self.options = train, validation, recipe, options
        self.joined, self.class_weights = joined, class_weights
        self.device = joined.device
        cuda = self.device.type == "cuda"
        self.plan = Plan(
            options.batch_size,
            options.accumulate,
            options.size,
            options.workers,
            options.seed,
            joined.rank,
            joined.world,
            pin_memory=cuda,
        )
        self.steps = self.plan.steps(train.count)
        self.amp = AMP[options.amp] if options.amp else None
        layout = torch.channels_last if options.channels_last else torch.contiguous_format
        self.model = model.to(self.device).to(memory_format=layout)
        if options.sync_bn:
            kind = nn.SyncBatchNorm if cuda else SyncBatchNorm2d
            self.model = kind.convert_sync_batchnorm(self.model)
        self.average = Average(self.model, recipe.average)
        self.optimizer = recipes.make_optimizer(recipe, self.model)
        self.loss = recipes.make_loss(recipe)
        self.scaler = _compat.grad_scaler(self.device.type, options.amp == "fp16")
        self.progress = Progress()
        self.saved = True
        state.seed_all(options.seed + joined.rank)
        self._resume()
        self.parallel = self._data_parallel()

    def run(self) -> int:
        self._open_logs()
        progress = self.progress
        self.parallel.train()
        with Stop("" if self.joined.rank else "stopping after this step\n") as self.stop:
            signal = 0
            if progress.step and not progress.seen:
                signal = self._evaluate()  # a checkpoint is saved before its epoch is evaluated
            while progress.epoch < self.recipe.epochs and not signal and not self._enough():
                signal = self._epoch()
                if progress.seen == self.steps * self.plan.global_batch:
                    progress.epoch, progress.seen = progress.epoch + 1, 0
                self._save()
                if not signal and not progress.seen:
                    signal = self._evaluate()
        if signal or progress.epoch < self.recipe.epochs:
            self.joined.say(f"stopped after step {progress.step}" + ("; --resume continues" if self.saved else ""))
        return 128 + signal if signal else int(not self.saved)

    def _data_parallel(self) -> nn.Module:
        """The model, or what computes it in every process and takes the mean of their gradients."""
        if self.joined.world == 1:
            return self.model
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(self.model, device_ids=device_ids)

    def _enough(self) -> bool:
        limit = self.options.max_steps
        return limit is not None and self.progress.step >= limit

    def _epoch(self) -> int:
        """Trains to the end of the epoch or to the last step that is wanted; or to a signal, which is returned."""
        progress, options = self.progress, self.options
        done = progress.seen // self.plan.global_batch
        loaded = batches(self.train.epoch(self.plan, progress.epoch, done * options.accumulate))
        total, since, began = torch.zeros((), device=self.device), 0, time.perf_counter()
        signal = 0
        with self._bar(done) as bar:
            for step in range(done, self.steps):
                rate = recipes.learning_rate(
                    self.recipe, progress.epoch + step / self.steps, progress.samples, self._update_batch()
                )
                total += self._step(loaded, rate)
                since += 1
                progress.step += 1
                progress.samples += self.plan.global_batch
                progress.seen += self.plan.global_batch
                bar.update()
                signal = self._signal()
                ending = bool(signal) or self._enough() or step + 1 == self.steps
                saving = progress.step % options.save_steps == 0
                if ending or saving or progress.step % options.log_steps == 0:
                    self._log(total, since, rate, time.perf_counter() - began, bar)
                    total, since, began = torch.zeros_like(total), 0, time.perf_counter()
                if ending:
                    break
                if saving:
                    self._save()
        return signal

    def _step(self, loaded: Iterator[tuple[Tensor, Tensor]], rate: float) -> Tensor:
        """One update of the weights; the mean loss of this process."""
        self.parallel.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        parts = self.options.accumulate
        for part in range(parts):
            pixels, targets = next(loaded)
            images = prepare(pixels, self.device, self.options.channels_last)
            targets = targets.to(self.device, non_blocking=True)
            alone = isinstance(self.parallel, DistributedDataParallel) and part + 1 < parts
            with self.parallel.no_sync() if alone else nullcontext():  # type: ignore[union-attr,operator]
                with torch.autocast(self.device.type, self.amp) if self.amp else nullcontext():
                    logits = self.parallel(images)
                loss = self.loss(logits, targets) / parts
                self.scaler.scale(loss).backward()
            total += loss.detach()
        self._update(rate)
        return total

    def _update(self, rate: float) -> None:
        """Of the weights, with the gradients that were computed."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.average.update_parameters(self.model)

    def _update_batch(self) -> int:
        """Images whose gradients an update is made with."""
        return self.plan.global_batch

    def _signal(self) -> int:
        """That any process has had."""
        return self.joined.highest(self.stop.signal)

    def _mean_loss(self, loss: float) -> float:
        """Of all processes."""
        return self.joined.sum(loss)[0] / self.joined.world

    def _random_states(self) -> list[Any]:
        """Of all processes."""
        return self.joined.gather(state.random_state())

    def _log(self, total: Tensor, steps: int, rate: float, seconds: float, bar: Any) -> None:
        loss = self._mean_loss(total.item() / steps)
        if loss != loss or loss in (float("inf"), float("-inf")):
            # fp16's scaler leaves out steps whose gradients are infinite; weights that are not finite never recover.
            if not all(bool(p.isfinite().all()) for p in self.model.parameters()):
                raise Diverged(
                    f"the weights are not finite at step {self.progress.step}, the loss is {loss}: they are not "
                    "saved; --resume continues from the checkpoint before, say with a lower --lr"
                )
        if self.joined.rank:
            return
        progress = self.progress
        speed = steps * self.plan.global_batch / max(seconds, 1e-9)
        epoch = progress.epoch + progress.seen / self.plan.global_batch / self.steps
        row = {"epoch": round(epoch, 4), "samples": progress.samples, "lr": rate, "loss": loss}
        self.steps_log.add(progress.step, **row, images_per_s=round(speed, 2))
        if self.board:
            for name in ("lr", "loss"):
                self.board.add_scalar(name, row[name], progress.step)
        bar.set_postfix(loss=f"{loss:.3f}", lr=f"{rate:.2e}")
        if bar.disable:
            self.joined.say(
                f"step {progress.step}, epoch {epoch:.2f}: loss {loss:.4f}, lr {rate:.3e}, {speed:.1f} images/s"
            )

    def _evaluate(self) -> int:
        """With and without averaging; the signal that kept it from that, or 0."""
        if self.validation is None:
            return 0
        for name, module in (("model", self.model), ("average", self.average.module)):
            scores = evaluate(
                module,
                self.validation,
                self.plan,
                self.joined,
                self.class_weights,
                self.options.channels_last,
                self.amp,
                lambda: self.stop.signal,
            )
            if not scores or self.joined.rank:
                continue
            text = ", ".join(f"{key} {value:.4f}" for key, value in scores.items() if key != "images")
            self.joined.say(f"epoch {self.progress.epoch}, {name}: {text} ({scores['images']:.0f} images)")
            self.evaluation_log.add(self.progress.step, epoch=self.progress.epoch, weights=name, **scores)
            if self.board:
                for key, value in scores.items():
                    self.board.add_scalar(f"{key}/{name}", value, self.progress.step)
        return self.joined.highest(self.stop.signal)

    def _open_logs(self) -> None:
        if self.joined.rank:
            return
        output, step = self.options.output, self.progress.step
        say = self.joined.say
        self.steps_log = logs.Log(
            output / "training.csv", ["epoch", "samples", "lr", "loss", "images_per_s"], step, say
        )
        scores = ["map100"] if self.train.multi_label else ["top1", "top5"]
        columns = ["epoch", "weights", "images", *scores]
        again = step if self.progress.seen else step - 1  # see run()
        self.evaluation_log = logs.Log(output / "evaluation.csv", columns, again, say)
        self.board = logs.tensorboard(output / "tensorboard", step)

    def _bar(self, done: int) -> Any:
        from tqdm import tqdm

        description = f"epoch {self.progress.epoch + 1}/{self.recipe.epochs}"
        disable = True if self.joined.rank else None  # None: unless standard error is a terminal
        return tqdm(total=self.steps, initial=done, desc=description, disable=disable)

    def _record(self) -> dict[str, Any]:
        """What decides how a training goes on."""
        plan = self.plan
        layout = {"batch_size": plan.batch_size, "accumulate": plan.accumulate, "size": plan.size, "seed": plan.seed}
        workers = {} if isinstance(self.train, Images) else {"workers": plan.workers}
        recipe = {key: value for key, value in dataclasses.asdict(self.recipe).items() if key != "epochs"}
        kind = {"amp": self.options.amp, "asynchronous": self.options.asynchronous}
        return {**layout, **workers, "processes": plan.world, **kind, **recipe}

    def _save(self) -> None:
        """A checkpoint, by the first process; where that fails the training goes on."""
        progress = self.progress
        generators = self._random_states()
        if self.joined.rank:
            return
        contents = {
            "progress": dataclasses.asdict(progress),
            "record": self._record(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "averaged": int(self.average.n_averaged),
            "random": generators,
        }
        output = self.options.output
        try:
            state.save(output, progress.step, self.model, self.average.module, contents, self.options.keep)
            self.saved = True
        except OSError as error:
            self.saved = False
            last = state.found(output)
            rest = f"the last one is {last[0]}" if last else "there is none yet"
            self.joined.say(f"cannot save a checkpoint at step {progress.step}: {error}; {rest}")

    def _resume(self) -> None:
        output, say = self.options.output, self.joined.say
        paths = state.found(output)
        if paths and not self.options.resume:
            raise FileExistsError(
                f"{output}: there are checkpoints of a training in it: --resume continues it, another --output keeps it"
            )
        for path in paths:
            try:
                contents = state.load(path, self.model, self.average.module)
                break
            except ValueError as error:
                if path == paths[-1]:
                    raise
                say(f"{error}; trying the one before")
        else:
            if self.options.resume:
                say(f"{output}: no checkpoint to resume from; the training begins")
            return
        wanted = [{key: group[key] for key in group if key != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(contents["optimizer"])
        for group, settings in zip(self.optimizer.param_groups, wanted):
            group.update(settings)  # the recipe of now, not of then
        self.scaler.load_state_dict(contents["scaler"])
        self.average.n_averaged.fill_(contents["averaged"])
        self.progress = Progress(**contents["progress"])
        before, now = contents["record"], self._record()
        changes = [f"{key} {before.get(key)} → {now[key]}" for key in now if before.get(key) != now[key]]
        say(f"continuing {path} at step {self.progress.step}")
        if changes:
            say(f"not exactly as it would have gone on: {', '.join(changes)}")
        if len(contents["random"]) == self.joined.world:
            state.set_random_state(contents["random"][self.joined.rank])
