"""The loop: warm start, epochs, checkpoints, and what is written down on the way."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

from caco.distributed.data_parallel import data_parallel, unused_parameters
from caco.distributed.world import World
from caco.errors import CacoError, Interrupted, UsageError, counted
from caco.evaluate.health import verdict
from caco.model import WarmStart
from caco.train.checkpoint import CheckpointFolder, Latest
from caco.train.interrupt import InterruptFlag
from caco.train.journal import Forecast, Journal, ProgressBar, SilentJournal, Stopwatch
from caco.train.monitor import knn_is_due
from caco.train.prepare import Prepared
from caco.train.step import (
    Rates,
    rates_at,
    remarks_on_rates,
    train_step,
    warm_start_cost,
    warm_start_lr,
    warm_start_step,
    warm_start_steps,
)

WARM_START_EPOCH = 1_000_000
"""The warm start's passes over the images are numbered from here, so that they share no view with an epoch."""


class Trainer:
    """Moves a TrainingState from where it is to the end of its schedule.

    In every process of a run alike; the main one writes. All decisions that lead to an exchange between processes
    (records, checkpoints, stopping) are taken at steps that all of them know, or by common vote.
    """

    def __init__(self, run: Prepared, folder: Path, world: World, interrupt: InterruptFlag) -> None:
        """A run to be resumed takes its state from the folder's latest checkpoint. Raises UsageError if that does not fit."""
        self.config, self.state, self.loader, self.broken = run.config, run.state, run.loader, run.broken
        self.card, self.precision, self.monitor, self.engine = run.card, run.precision, run.monitor, run.engine
        self.folder, self.world, self.interrupt = folder, world, interrupt
        config = run.config
        self.epochs = int(config.epochs)
        self.steps = self.epochs * self.loader.steps_per_epoch
        self.unused = unused_parameters(run.state.model.backbone, config.views.size, world)
        self.checkpoints = CheckpointFolder(folder / "checkpoints", config.monitor.keep_checkpoints)
        self.last_saved = time.monotonic()
        self.last_spread = 1.0
        self.broken_told = 0
        self.told: set[str] = set()
        self.forecast = Forecast(self.loader.steps_per_epoch, new=not config.resume)
        metrics_bytes, problems = self._resume() if config.resume else (0, ())
        self.state.knn_is_owed &= self.monitor is not None  # it can have been switched off meanwhile
        tensorboard = config.monitor.tensorboard
        self.journal = Journal(folder, metrics_bytes, tensorboard) if world.is_main else SilentJournal()
        for problem in problems:
            self.journal.say(f"an earlier checkpoint is taken: {problem}")

    def train(self) -> None:
        """Train to the end; the last checkpoint holds the result."""
        try:
            if self.state.step == self.steps and not self.state.knn_is_owed:
                self.journal.say("the run is finished; nothing to do")
                return
            self._announce()
            self.state.model.train()
            self._warm_start()
            self._train_epochs()
            self._tell_broken()
            self.journal.note("the run is finished")
        finally:
            self.journal.close()

    def _announce(self) -> None:
        config = self.config
        resumed = f"resumed at {self._position()}: " if config.resume else ""
        processes = f", {self.world.size} processes" if self.world.size > 1 else ""
        self.journal.say(
            f"{resumed}training {config.backbone} on {len(self.loader.source):,} images of {config.data}: "
            f"{self.epochs} epochs, {self.steps:,} steps of {config.batch_size}, {config.bank_size:,} slots, "
            f"on {self.world.device} ({str(self.precision).removeprefix('torch.')}{processes}), into {self.folder}"
        )
        if self.engine:
            self.journal.say(f"encoder: {self.engine}")
        for remark in remarks_on_rates(self.config):
            self.journal.say(remark)

    def _position(self) -> str:
        state = self.state
        return f"step {state.step:,}" if state.step else f"warm-start step {state.warm_start_step:,}"

    def _warm_start(self) -> None:
        """Fill the bank with keys (algorithm: warm start of the bank), then begin with f′ = f."""
        state, per_epoch = self.state, self.loader.steps_per_epoch
        steps = warm_start_steps(self.config, per_epoch)
        if state.warm_start_step >= steps:
            return
        network = data_parallel(
            WarmStart(state.model, self.config.bank.warm_start_temperature),
            self.world,
            ignored=[state.model.bank.weight, *self.unused],
        )
        lr, momentum = warm_start_lr(self.config), self.config.bank.warm_start_key_momentum
        cost = warm_start_cost(self.config.views)
        with (
            ProgressBar(self.journal, steps, state.warm_start_step, "warm-start step") as bar,
            closing(self.loader.batches(WARM_START_EPOCH, state.warm_start_step, steps)) as batches,
        ):
            for batch in batches:
                loss = warm_start_step(
                    state, network, batch.views, lr, momentum, self.precision, self.world, self.config.accumulate
                )
                done = state.warm_start_step
                if done == steps:
                    state.model.copy_to_key_encoder()
                bar.advance()
                logged = self._is_logged(done) or done == steps
                if said := self.forecast.note(self.steps - state.step + (steps - done) * cost, logged, cost):
                    self.journal.say(said)
                if logged:
                    self._stop_if_not_finite(self.state.meters.bad_step(self.world))
                    mean = float(self.world.sum(loss)) / self.world.size
                    self.journal.record("warm start", done, loss=mean)
                    bar.show(done, f"loss {mean:.3f}")
                self._save_when_due(done, known_to_all=done == steps)

    def _train_epochs(self) -> None:
        state, per_epoch = self.state, self.loader.steps_per_epoch
        apart = [state.model.bank.weight] if self.config.bank.sharded else []
        network = data_parallel(state.model, self.world, ignored=[*apart, *self.unused])
        if state.knn_is_owed:  # the run was stopped between the end of an epoch and its check
            self._save_when_due(state.step, known_to_all=True, best=self._check(state.step // per_epoch - 1))
        clock = Stopwatch()
        with (
            ProgressBar(self.journal, self.steps, state.step) as bar,
            closing(self.loader.batches(0, state.step, self.steps)) as batches,
        ):
            for batch in clock.waiting(batches):
                epoch, step = divmod(state.step, per_epoch)
                last, rates = step + 1 == per_epoch, rates_at(self.config, epoch)
                next_rates = rates_at(self.config, epoch + 1) if last else rates
                momentum, accumulate = next_rates.key_momentum, self.config.accumulate
                train_step(state, network, batch.views, rates, momentum, self.precision, accumulate)
                clock.images += self.config.batch_size
                bar.advance()
                logged = self._is_logged(state.step) or last
                if logged:
                    text = self._log(epoch, rates)
                    speed, wait = clock.take()
                    self.journal.record_speed(state.step, speed, wait)
                    text += f", {speed:,.1f} images/s, {wait:.0%} waiting for data"
                    bar.show(state.step, text)
                if said := self.forecast.note(self.steps - state.step, logged):
                    self.journal.say(said)
                if last:
                    self.journal.note(f"epoch {epoch + 1}/{self.epochs}: step {state.step:,}, {text}")
                best = last and self._end_epoch(epoch)
                self._save_when_due(state.step, known_to_all=last, best=best)
                if last:
                    clock.restart()

    def _is_logged(self, step: int) -> bool:
        return step % self.config.monitor.log_steps == 0

    def _log(self, epoch: int, rates: Rates) -> str:
        """Record the means since the last record; return them in short."""
        measured = self.state.meters.take(self.world)
        self._stop_if_not_finite(measured.first_bad_step)
        self.last_spread = measured.feature_spread
        values = {name: value for name, value in vars(measured).items() if name != "first_bad_step"}
        self.journal.record("train", self.state.step, epoch=epoch, **values, **vars(rates))
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
        self._tell_broken()
        if self.monitor is None or not knn_is_due(epoch, self.epochs, self.config.monitor):
            return False
        self.state.knn_is_owed = True
        self._save_when_due(self.state.step, known_to_all=True)  # before the check, which takes its time and may fail
        return self._check(epoch, f", {used:,} of {self.config.bank_size:,} slots used")

    def _check(self, epoch: int, said_too: str = "") -> bool:
        """Do the kNN check that is owed, and record it. Return whether it is the best so far."""
        assert self.monitor is not None
        result = self.monitor(self.state.model.backbone)
        self.state.knn_is_owed = False
        self.journal.record("knn", self.state.step, epoch=epoch, **result)
        queries = f"{result['queries']:,} images"
        self.journal.say(f"epoch {epoch + 1}/{self.epochs}: kNN {result['top1']:.1f} % of {queries}{said_too}")
        best = result["top1"] > self.state.best_knn
        self.state.best_knn = max(self.state.best_knn, result["top1"])
        return best

    def _tell_broken(self) -> None:
        """Say how many images were skipped, when they have become more."""
        if len(self.broken) > self.broken_told:
            self.broken_told = len(self.broken)
            count = counted(self.broken_told, "broken image")
            self.journal.say(f"{count} skipped so far; which, and why: {self.folder / 'skipped.txt'}")

    def _save_when_due(self, step: int, known_to_all: bool, best: bool = False) -> None:
        """Save when it is time to, or when asked to stop; then stop.

        Several processes vote, at the steps at which they meet anyway; a single one looks after every step.
        """
        if self.world.size > 1 and not (known_to_all or self._is_logged(step)):
            return
        late = time.monotonic() - self.last_saved >= self.config.monitor.checkpoint_minutes * 60
        stop, late, best = self.world.any(self.interrupt.name is not None, late, best)
        finished = self.state.step == self.steps
        if not (stop or late or best or finished):
            return
        path = self._save(best)
        if stop and not finished:
            name = next((name for name in self.world.gather_objects(self.interrupt.name) if name), "a signal")
            self.journal.say(f"stopped by {name} and saved")
            raise Interrupted(
                f"stopped by {name} at {self._position()} and saved to {path}; "
                f"go on with: caco pretrain --out {self.folder} --resume"
            )

    def _save(self, best: bool) -> Path:
        """Write a checkpoint. Raises CacoError instead when it would hold what no step can go on from."""
        self._stop_if_not_finite(self.state.meters.bad_step(self.world))
        if any(self.world.any(not self.state.is_finite())):  # the loss of a step is that of the weights before it
            self._stop_if_not_finite(self.state.step or self.state.warm_start_step, "weights are")
        contents = {
            **self.state.state_dict(self.world),
            "metrics_bytes": self.journal.sync(),
            "images": len(self.loader.source),
            "epoch": self.state.step // self.loader.steps_per_epoch,
            "card": {**vars(self.card), "step": self.state.step},
        }
        self.last_saved = time.monotonic()
        step = self.state.warm_start_step + self.state.step
        if self.world.is_main:
            self.checkpoints.save(contents, step, best)
        self.world.wait()
        self.broken.merge(self.world)  # may end the run, which by now is saved
        return self.checkpoints.path(step)

    def _resume(self) -> tuple[int, tuple[str, ...]]:
        """Load the latest checkpoint that can be read, which the main process does.

        Return the length metrics.jsonl had then, and why newer checkpoints cannot be read.
        """
        latest: Latest = self.world.share(self.checkpoints.latest)
        contents = latest.content
        if contents["images"] != len(self.loader.source):
            raise UsageError(
                f"--resume: the run began with {contents['images']:,} images, {self.config.data} now has "
                f"{len(self.loader.source):,}; resume needs the same images"
            )
        self.state.load_state_dict(contents, self.world)
        return int(contents["metrics_bytes"]), latest.problems

    def _stop_if_not_finite(self, step: int | None, what: str = "loss is") -> None:
        if step is not None:
            kept = [path.name for path in self.checkpoints.paths()]
            kind = "step" if self.state.step else "warm-start step"
            raise CacoError(
                f"the {what} not finite at {kind} {step:,}; the run stops. Last good checkpoint: "
                f"{kept[-1] if kept else 'none yet'} in {self.checkpoints.folder}. Try a lower --lr or --bank.lr, "
                "or --precision fp32."
            )
