"""Pre-training, from a configuration to a finished run folder."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from caco.backbone import Encoder, adopt_backbone, create_backbone, projector, stem_of
from caco.bank import Bank
from caco.config import MonitorOptions, Pretrain
from caco.data.broken import BrokenImages
from caco.data.loader import Batch, TrainingViews
from caco.data.source import ImageSource, open_source
from caco.errors import CacoError, Interrupted, UsageError
from caco.evaluate.health import verdict
from caco.model import CaCo, WarmStart, view_pairs
from caco.optim import encoder_optimizer
from caco.train.checkpoint import CheckpointFolder, remove_leftovers
from caco.train.distributed import World, choose_device, choose_precision
from caco.train.interrupt import InterruptFlag
from caco.train.journal import Journal, ProgressBar
from caco.train.meters import Meters
from caco.train.monitor import KnnMonitor, create_monitor
from caco.train.run_folder import check_same_mathematics, open_run_folder, read_config, write_config, write_environment
from caco.train.state import TrainingState
from caco.train.step import Schedules, train_step, warm_start_step
from caco.weights import BackboneCard, download_weights, load_into, read_weights, save_backbone

WARM_START_EPOCH = 1_000_000
"""The warm start's passes over the images are numbered from here, so that they share no view with an epoch."""


def run(config: Pretrain, backbone: nn.Module | None = None) -> Path:
    """Pre-train as configured and return the path of the finished backbone.

    backbone: the user's own module, instead of `config.backbone` by name. Raises UsageError before any heavy work,
    Interrupted after a signal (the run is saved), CacoError when the run cannot go on (its last good state is kept).
    """
    check(config)
    world = World(device=choose_device(config.device))
    precision = choose_precision(config.precision, world.device)
    module = _start_backbone(config, world, backbone)
    source = open_source(config.data, download=config.download)
    folder = open_run_folder(config)
    remove_leftovers(folder)
    broken = BrokenImages(len(source), config.monitor.broken_share, folder / "skipped.txt")
    try:
        loader = _create_loader(config, source, world, broken)
        config = _resolve_epochs(config, loader.steps_per_epoch)
        if config.resume:
            check_same_mathematics(read_config(folder), config)
        write_config(folder, config)
        write_environment(folder, str(world.device), world.size)
        state = create_state(config, module, world)
        trainer = Trainer(config, folder, state, loader, world, precision)
        with InterruptFlag() as interrupt:
            return trainer.train(_create_monitor(config, source, world, precision), interrupt)
    finally:
        broken.write()


def check(config: Pretrain) -> None:
    """Raise UsageError for what is wrong with a configuration in itself."""
    if not config.data:
        raise UsageError("--data is missing: name a folder of images (or textures, for built-in pictures)")
    positive = {"--batch-size": config.batch_size, "--bank-size": config.bank_size, "--views.size": config.views.size}
    for option, value in positive.items():
        if value < 1:
            raise UsageError(f"{option} {value}: must be at least 1")
    if config.batch_size == 1:
        raise UsageError("--batch-size 1: batch norm needs at least 2 images")
    if isinstance(config.epochs, int) and config.epochs < 1:
        raise UsageError(f"--epochs {config.epochs}: must be at least 1")
    if config.views.large < 2:
        raise UsageError(f"--views.large {config.views.large}: the method needs two large views")
    temperatures = {"temperature": config.bank.temperature, "slot-temperature": config.bank.slot_temperature}
    for name, value in temperatures.items():
        if not value > 0:
            raise UsageError(f"--bank.{name} {value}: must be above 0")


def create_state(config: Pretrain, backbone: nn.Module, world: World) -> TrainingState:
    """Return the networks, bank and optimizers at the start of a run."""
    encoder = Encoder(backbone, projector(int(backbone.num_features), config.encoder.projector, config.encoder.embedding))  # type: ignore[arg-type]
    bank = Bank(config.bank_size, config.encoder.embedding, config.bank.temperature, config.bank.slot_temperature)
    model = CaCo(encoder, bank, view_pairs(config.views.large, config.views.small)).to(world.device)
    lr = config.lr * config.batch_size / 256
    options = config.optimizer
    return TrainingState(
        model=model,
        optimizer=encoder_optimizer(options.name, model.encoder, lr, options.momentum, options.weight_decay),
        bank_optimizer=torch.optim.SGD([model.bank.weight], lr=config.bank.lr, momentum=config.bank.momentum),
        meters=Meters(config.bank_size, world.device),
    )


@dataclass
class Trainer:
    """The loop: warm start, epochs, checkpoints; resumes from the folder's latest checkpoint when asked to."""

    config: Pretrain
    folder: Path
    state: TrainingState
    loader: TrainingViews
    world: World
    precision: torch.dtype

    def train(self, monitor: KnnMonitor | None, interrupt: InterruptFlag) -> Path:
        """Train to the end and return the path of the backbone."""
        self.checkpoints = CheckpointFolder(self.folder / "checkpoints", self.config.monitor.keep_checkpoints)
        self.monitor, self.interrupt = monitor, interrupt
        self.last_saved = time.monotonic()
        self.last_spread = 1.0
        self.told: set[str] = set()
        metrics_bytes = self._resume() if self.config.resume else 0
        self.journal = Journal(self.folder, metrics_bytes, self.config.monitor.tensorboard)
        self.schedules = Schedules(
            epochs=int(self.config.epochs),
            lr=self.config.lr,
            batch_size=self.config.batch_size,
            bank_size=self.config.bank_size,
            optimizer=self.config.optimizer,
            bank=self.config.bank,
            encoder=self.config.encoder,
        )
        try:
            self._announce()
            self.state.model.train()
            self._warm_start()
            self._epochs()
            return self._finish()
        finally:
            self.journal.close()

    @property
    def steps(self) -> int:
        """Training steps of the whole run."""
        return int(self.config.epochs) * self.loader.steps_per_epoch

    def _announce(self) -> None:
        config, state = self.config, self.state
        verb = f"resumed at step {state.step:,} of" if config.resume else "training"
        self.journal.say(
            f"{verb} {config.backbone} on {len(self.loader.source):,} images of {config.data}: {config.epochs} epochs, "
            f"{self.steps:,} steps of {config.batch_size}, {config.bank_size:,} slots, on {self.world.device} "
            f"({str(self.precision).removeprefix('torch.')}), into {self.folder}"
        )

    def _warm_start(self) -> None:
        """Fill the bank with keys (algorithm: warm start), then begin with f′ = f."""
        steps = warm_start_steps(self.config, self.loader.steps_per_epoch)
        if self.state.step > 0 or self.state.warm_start_step >= steps:
            return
        network = WarmStart(self.state.model)
        bar = ProgressBar(self.journal, steps, self.state.warm_start_step)
        while self.state.warm_start_step < steps:
            done = self.state.warm_start_step
            epoch, first = divmod(done, self.loader.steps_per_epoch)
            for batch in self.loader.batches(WARM_START_EPOCH + epoch, first):
                lr = self.schedules.warm_start_lr
                loss = warm_start_step(self.state, network, batch.views, lr, self.precision, self.world)
                done = self.state.warm_start_step
                bar.advance()
                if done == steps:
                    self.state.model.copy_to_key_encoder()
                if done % self.config.monitor.log_steps == 0 or done == steps:
                    value = self._mean(loss)
                    self.journal.record("warm start", done, loss=value)
                    self._stop_if_not_finite("warm-start step")
                    bar.show(done, f"warm start, loss {value:.3f}")
                self._after_step()
                if done == steps:
                    break
        bar.close()

    def _epochs(self) -> None:
        per_epoch, log_steps = self.loader.steps_per_epoch, self.config.monitor.log_steps
        bar = ProgressBar(self.journal, self.steps, self.state.step)
        clock = Stopwatch()
        for epoch in range(self.state.step // per_epoch, int(self.config.epochs)):
            rates, next_rates = self.schedules.at(epoch), self.schedules.at(epoch + 1)
            for batch in clock.waiting(self.loader.batches(epoch, self.state.step - epoch * per_epoch)):
                last = self.state.step + 1 == (epoch + 1) * per_epoch
                momentum = (next_rates if last else rates).key_momentum
                train_step(self.state, self.state.model, batch.views, rates, momentum, self.precision)
                clock.images += self.config.batch_size
                bar.advance()
                if self.state.step % log_steps == 0 or last:
                    text = self._log(epoch, rates.lr, rates.bank_lr, rates.key_momentum)
                    speed, wait = clock.take()
                    self.journal.record_speed(self.state.step, speed, wait)
                    bar.show(self.state.step, f"{text}, {speed:.1f} images/s, {wait:.0%} waiting for data")
                best = last and self._end_epoch(epoch)
                self._after_step(best)
            clock.restart()
        bar.close()

    def _log(self, epoch: int, lr: float, bank_lr: float, key_momentum: float) -> str:
        """Record the means since the last record; return them in short."""
        measured = self.state.meters.take(self.world)
        self._stop_if_not_finite("step", measured.first_bad_step)
        self.last_spread = measured.feature_spread
        self.journal.record(
            "train",
            self.state.step,
            epoch=epoch,
            loss=measured.loss,
            positive_probability=measured.positive_probability,
            hit_rate=measured.hit_rate,
            feature_spread=measured.feature_spread,
            slots_used=measured.slots_used,
            lr=lr,
            bank_lr=bank_lr,
            key_momentum=key_momentum,
        )
        return f"loss {measured.loss:.3f}, positive probability {measured.positive_probability:.3f}"

    def _end_epoch(self, epoch: int) -> bool:
        """Record the epoch: how the bank is used, the kNN check when due. Return whether it is the best so far."""
        usage = self.state.meters.take_epoch_usage(self.world)
        used, perplexity, choices = int(usage.used), float(usage.perplexity), int(usage.choices)
        self.journal.record("epoch", self.state.step, epoch=epoch, slots_used=used, slot_perplexity=perplexity)
        findings = verdict(
            slots=self.config.bank_size, used=used, perplexity=perplexity, choices=choices, spread=self.last_spread
        )
        for finding in findings:
            if finding.advice not in self.told:  # once is enough
                self.told.add(finding.advice)
                self.journal.say(f"epoch {epoch + 1}: {finding}")
        if self.monitor is None or not knn_is_due(epoch, int(self.config.epochs), self.config.monitor):
            return False
        result = self.monitor(self.state.model.encoder.backbone)
        self.journal.record("knn", self.state.step, epoch=epoch, **result)
        self.journal.say(
            f"epoch {epoch + 1}/{self.config.epochs}: kNN {result['top1']:.1f} % of {result['queries']:,} images, "
            f"{used:,} of {self.config.bank_size:,} slots used"
        )
        best = result["top1"] > self.state.best_knn
        self.state.best_knn = max(self.state.best_knn, result["top1"])
        return best

    def _after_step(self, best: bool = False) -> None:
        """Save when it is time to, or when asked to stop; then stop."""
        options = self.config.monitor
        due = time.monotonic() - self.last_saved >= options.checkpoint_minutes * 60
        if best or due or self.interrupt.name or self.state.step == self.steps:
            path = self._save(best)
            if self.interrupt.name and self.state.step < self.steps:
                self.journal.say(f"stopped by {self.interrupt.name} and saved")
                raise Interrupted(
                    f"stopped by {self.interrupt.name} at step {self.state.step:,} and saved to {path}; "
                    f"go on with: caco pretrain --out {self.folder} --resume"
                )

    def _save(self, best: bool) -> Path:
        self._stop_if_not_finite("step")
        self.last_saved = time.monotonic()
        contents = {
            **self.state.state_dict(),
            "metrics_bytes": self.journal.sync(),
            "images": len(self.loader.source),
            "steps_per_epoch": self.loader.steps_per_epoch,
            "card": vars(backbone_card(self.config, self.state)),
        }
        return self.checkpoints.save(contents, self.state.warm_start_step + self.state.step, best)

    def _resume(self) -> int:
        """Load the latest checkpoint; return the length metrics.jsonl had then."""
        path, contents = self.checkpoints.latest()
        if contents["images"] != len(self.loader.source):
            raise UsageError(
                f"--resume: the run began with {contents['images']:,} images, {self.config.data} now has "
                f"{len(self.loader.source):,}; resume needs the same images"
            )
        self.state.load_state_dict(contents)
        return int(contents["metrics_bytes"])

    def _stop_if_not_finite(self, what: str, step: int | None = None) -> None:
        step = step if step is not None else self.state.meters.bad_step(self.world)
        if step is not None:
            kept = [path.name for path in self.checkpoints.paths()]
            raise CacoError(
                f"the loss is not finite at {what} {step:,}; the run stops. Last good checkpoint: "
                f"{kept[-1] if kept else 'none yet'} in {self.checkpoints.folder}. Try a lower --lr or --bank.lr, "
                "or --precision fp32."
            )

    def _mean(self, value: Tensor) -> float:
        return float(self.world.sum(value)) / self.world.size

    def _finish(self) -> Path:
        path = self.folder / "export" / "backbone.safetensors"
        save_backbone(path, self.state.model.encoder.backbone, backbone_card(self.config, self.state))
        return path


class Stopwatch:
    """Images per second, and the share of the time spent waiting for the next batch."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget what was measured (what came between was no training)."""
        self.began, self.waited, self.images = time.monotonic(), 0.0, 0

    def waiting(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches, timing the wait for each."""
        while True:
            asked = time.monotonic()
            batch = next(batches, None)
            self.waited += time.monotonic() - asked
            if batch is None:
                return
            yield batch

    def take(self) -> tuple[float, float]:
        """Return (images per second, share of time waited) since the last call, and start anew."""
        seconds = max(time.monotonic() - self.began, 1e-9)
        result = self.images / seconds, self.waited / seconds
        self.restart()
        return result


def warm_start_steps(config: Pretrain, steps_per_epoch: int) -> int:
    """Return the length of the warm start; auto, as published: until all slots are filled, or the data ends."""
    if config.bank.warm_start_steps != "auto":
        return config.bank.warm_start_steps
    return min(math.ceil(config.bank_size / config.batch_size), steps_per_epoch)


def knn_is_due(epoch: int, epochs: int, options: MonitorOptions) -> bool:
    """Return whether the kNN check follows this epoch (counted from 0)."""
    done = epoch + 1
    return done <= options.knn_first_epochs or done % options.knn_epochs == 0 or done == epochs


def backbone_card(config: Pretrain, state: TrainingState) -> BackboneCard:
    """Return what must be known to use the run's backbone."""
    views = config.views
    return BackboneCard(
        backbone=config.backbone,
        stem=stem_of(state.model.encoder.backbone),
        size=views.size,
        resize=views.evaluation_resize,
        mean=views.mean,
        std=views.std,
        step=state.step,
    )


def _start_backbone(config: Pretrain, world: World, own: nn.Module | None) -> nn.Module:
    """Return the backbone the run starts from: seeded at random, or from --weights."""
    torch.manual_seed(config.seed)
    size, stem = config.views.size, config.encoder.stem
    backbone = create_backbone(config.backbone, size, stem) if own is None else adopt_backbone(own, size)
    if config.weights.startswith("timm:"):
        name = config.weights.removeprefix("timm:")
        load_into(backbone, download_weights(name), f"--weights {config.weights}")
    elif config.weights:
        load_into(backbone, read_weights(Path(config.weights))[0], f"--weights {config.weights}")
    return backbone


def _create_monitor(
    config: Pretrain, source: ImageSource, world: World, precision: torch.dtype
) -> KnnMonitor | None:
    val = open_source(config.val, split="val", download=config.download) if config.val else None
    options, views, workers = config.monitor, config.views, worker_count(config.workers)
    return create_monitor(source, val, options, views, config.seed, world.device, precision, workers)


def _create_loader(config: Pretrain, source: ImageSource, world: World, broken: BrokenImages) -> TrainingViews:
    return TrainingViews(
        source,
        config.views.recipes(),
        config.views.mean,
        config.views.std,
        batch_size=config.batch_size,
        seed=config.seed,
        workers=worker_count(config.workers),
        device=world.device,
        broken=broken,
        rank=world.rank,
        world_size=world.size,
    )


def worker_count(workers: int | str) -> int:
    """Return the number of threads for "auto" (one per core this process may use) or a number."""
    if workers != "auto":
        return max(int(workers), 1)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _resolve_epochs(config: Pretrain, steps_per_epoch: int) -> Pretrain:
    """Put a number in place of --epochs auto."""
    if config.epochs != "auto":
        return config
    return replace(config, epochs=min(max(math.ceil(20_000 / steps_per_epoch), 50), 800))
