"""The loop: warm start, epochs, checkpoints, and what is written down on the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from torch import Tensor

from caco.distributed.data_parallel import data_parallel, unused_parameters
from caco.distributed.world import World
from caco.errors import CacoError, Interrupted, counted
from caco.evaluate.health import EARLY, faults
from caco.model import WarmStart
from caco.train.captured import Output, captured
from caco.train.checkpoint import CheckpointFolder, Latest, check_same_images, identity
from caco.train.interrupt import InterruptFlag
from caco.train.journal import Journal, SilentJournal
from caco.train.monitor import knn_is_due
from caco.train.prepare import Prepared
from caco.train.progress import Forecast, ProgressBar, Stopwatch
from caco.train.state import without_bank
from caco.train.step import (
    Rates,
    compute_gradients,
    rates_at,
    remarks_on_rates,
    train_step,
    warm_start_cost,
    warm_start_gradients,
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
        self.run, self.folder, self.world, self.interrupt = run, folder, world, interrupt
        self.config, self.state, self.loader = run.config, run.state, run.loader
        self.epochs = int(self.config.epochs)
        self.steps = self.epochs * self.loader.steps_per_epoch
        self.first_step = self.config.start_epoch * self.loader.steps_per_epoch
        self.images = identity(self.loader.source)
        self.unused = unused_parameters(self.state.model.backbone, self.config.views.size, world)
        self.checkpoints = CheckpointFolder(folder / "checkpoints", self.config.monitor.keep_checkpoints)
        self.last_saved = time.monotonic()
        self.last_spread = 1.0
        self.announced_broken = 0
        self.announced_advice: set[str] = set()
        self.forecast = Forecast(self.loader.steps_per_epoch, new=not self.config.resume)
        metrics_bytes, problems = self._resume() if self.config.resume else (0, ())
        self.state.knn_is_owed &= run.monitor is not None  # it can have been switched off meanwhile
        tensorboard = self.config.monitor.tensorboard
        filling = warm_start_steps(self.config, self.loader.steps_per_epoch)
        done = self.state.step if self.state.step > self.first_step else self.state.warm_start_step - filling
        resumed_at = done if self.config.resume else None
        self.journal = (
            Journal(folder, metrics_bytes, tensorboard, warm_start_steps=filling, resumed_at=resumed_at)
            if world.is_main
            else SilentJournal()
        )
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
            self._announce_broken()
            self.journal.note("the run is finished")
        finally:
            self.journal.close()

    def _announce(self) -> None:
        config = self.config
        resumed = f"resumed at {self._in_words(self._last_step)}: " if config.resume else ""
        processes = f", {self.world.size} processes" if self.world.size > 1 else ""
        filling = warm_start_steps(config, self.loader.steps_per_epoch) - self.state.warm_start_step
        warm_start = f" after a warm start of {filling:,}" if filling > 0 else ""
        part = f"{self.epochs - config.start_epoch:,} of " if config.start_epoch else ""
        self.journal.say(
            f"{resumed}training {config.backbone} on {len(self.loader.source):,} images of {config.data}: "
            f"{part}{counted(self.epochs, 'epoch')}, {counted(self.steps - self.first_step, 'step')} of "
            f"{config.batch_size}{warm_start}, {config.bank_size:,} slots, "
            f"on {self.world.device} ({str(self.run.precision).removeprefix('torch.')}{processes}), into {self.folder}"
        )
        if self.run.engine:
            self.journal.say(f"engine: {self.run.engine}")
        for remark in remarks_on_rates(self.config):
            self.journal.say(remark)

    @property
    def _last_step(self) -> int:
        """The last step taken, of the training or of the warm start before it."""
        return self.state.step if self.state.step > self.first_step else self.state.warm_start_step

    def _in_words(self, step: int) -> str:
        return f"{'step' if self.state.step > self.first_step else 'warm-start step'} {step:,}"

    def _warm_start(self) -> None:
        """Fill the bank with keys (algorithm: warm start of the bank), then begin with f′ = f."""
        state, per_epoch = self.state, self.loader.steps_per_epoch
        steps = warm_start_steps(self.config, per_epoch)
        if state.warm_start_step >= steps:
            return
        contrast = WarmStart(state.model, self.config.bank.warm_start_temperature)
        network = data_parallel(contrast, self.world, ignored=[state.model.bank.weight, *self.unused])
        gradients = self._captured(partial(warm_start_gradients, network))
        lr, momentum = warm_start_lr(self.config), self.config.bank.warm_start_key_momentum
        cost = warm_start_cost(self.config.views)
        with (
            ProgressBar(self.journal, steps, state.warm_start_step, "warm-start step") as bar,
            closing(self.loader.batches(WARM_START_EPOCH, state.warm_start_step, steps)) as batches,
        ):
            for batch in batches:
                loss = warm_start_step(state, gradients, batch.views, lr, momentum, self.world)
                done = state.warm_start_step
                is_last = done == steps
                if is_last:
                    state.model.copy_to_key_encoder()
                bar.advance()
                is_due = is_last or self._record_is_due(done)
                self._announce_forecast(self.steps - state.step + (steps - done) * cost, is_due, cost)
                if is_due:
                    bar.show(done, self._record_warm_start(loss))
                self._save_when_due(done, all_processes_are_here=is_last)

    def _record_warm_start(self, loss: Tensor) -> str:
        """Record the loss of a step of the warm start, the mean over all processes; return it in short."""
        self._stop_if_not_finite(self.state.meters.bad_step(self.world))
        mean = float(self.world.sum(loss)) / self.world.size
        self.journal.record("warm start", self.state.warm_start_step, loss=mean)
        return f"loss {mean:.3f}"

    def _train_epochs(self) -> None:
        state, per_epoch = self.state, self.loader.steps_per_epoch
        apart = [state.model.bank.weight] if self.config.bank.sharded else []
        network = data_parallel(state.model, self.world, ignored=[*apart, *self.unused])
        gradients = self._captured(partial(compute_gradients, state.model, network))
        if state.knn_is_owed:  # the run was stopped between the end of an epoch and its check
            best = self._knn_check(state.step // per_epoch - 1)
            self._save_when_due(state.step, all_processes_are_here=True, best=best)
        clock = Stopwatch()
        with (
            ProgressBar(self.journal, self.steps, state.step) as bar,
            closing(self.loader.batches(0, state.step, self.steps)) as batches,
        ):
            for batch in clock.waiting(batches):
                epoch, step = divmod(state.step, per_epoch)
                ends_epoch = step + 1 == per_epoch
                rates, next_rates = rates_at(self.config, epoch), rates_at(self.config, epoch + ends_epoch)
                train_step(state, gradients, batch.views, rates, next_rates.key_momentum)
                clock.images += self.config.batch_size
                bar.advance()
                is_due = ends_epoch or self._record_is_due(state.step)
                if is_due:
                    numbers = self._record_step(epoch, rates, clock)
                    bar.show(state.step, numbers)
                self._announce_forecast(self.steps - state.step, is_due)
                if ends_epoch:
                    self._end_epoch(epoch, numbers)
                    clock.restart()
                else:
                    self._save_when_due(state.step)

    def _captured(self, gradients: Callable[..., Output]) -> Callable[[Sequence[Tensor]], Output]:
        """Return how the gradients of a step are computed in this run, a function of the views."""
        work = partial(gradients, precision=self.run.precision, accumulate=self.config.accumulate)
        return captured(work, self.state.model.parameters(), self.config, self.world)

    def _record_is_due(self, step: int) -> bool:
        return step % self.config.monitor.log_steps == 0

    def _record_step(self, epoch: int, rates: Rates, clock: Stopwatch) -> str:
        """Record the means since the last record, and the speed; return them in short."""
        measured = self.state.meters.take(self.world)
        self._stop_if_not_finite(measured.first_bad_step)
        self.last_spread = measured.feature_spread
        values = {name: value for name, value in vars(measured).items() if name != "first_bad_step"}
        self.journal.record("train", self.state.step, epoch=epoch, **values, **vars(rates))
        speed, wait = clock.take()
        self.journal.record_speed(self.state.step, speed, wait)
        return (
            f"loss {measured.loss:.3f}, positive probability {measured.positive_probability:.3f}, "
            f"{speed:,.1f} images/s, {wait:.0%} waiting for data"
        )

    def _end_epoch(self, epoch: int, numbers: str) -> None:
        """Record the epoch: how the bank is used, the kNN check when due. Save when due."""
        self.journal.note(f"epoch {epoch + 1}/{self.epochs}: step {self.state.step:,}, {numbers}")
        used = self._record_usage(epoch)
        self._announce_broken()
        best = False
        if self.run.monitor is not None and knn_is_due(epoch, self.epochs, self.config.monitor):
            self.state.knn_is_owed = True
            # Before the check, which takes its time and may fail.
            self._save_when_due(self.state.step, all_processes_are_here=True)
            best = self._knn_check(epoch, f", {used:,} of {self.config.bank_size:,} slots used")
        self._save_when_due(self.state.step, all_processes_are_here=True, best=best)

    def _record_usage(self, epoch: int) -> int:
        """Record how the bank was used in an epoch, and give advice; return the number of slots used."""
        usage = self.state.meters.take_epoch_usage(self.world)
        used, perplexity, choices = int(usage.used), float(usage.perplexity), int(usage.choices)
        self.journal.record("epoch", self.state.step, epoch=epoch, slots_used=used, slot_perplexity=perplexity)
        if self.state.step - self.first_step < EARLY:
            return used
        findings = faults(
            slots=self.config.bank_size, used=used, perplexity=perplexity, choices=choices, spread=self.last_spread
        )
        for finding in findings:
            if finding.advice not in self.announced_advice:  # once is enough
                self.announced_advice.add(finding.advice)
                self.journal.say(f"epoch {epoch + 1}: {finding}")
        return used

    def _knn_check(self, epoch: int, more: str = "") -> bool:
        """Do the kNN check that is owed, and record it. Return whether it is the best so far. more: said behind it."""
        assert self.run.monitor is not None
        try:
            result = self.run.monitor(self.state.model.backbone)
        except CacoError as error:
            raise CacoError(
                f"the kNN check after epoch {epoch + 1} failed: {error}. Add --monitor.knn-epochs 0 (no kNN checks), or "
                f"--val with other labelled images, to: {self.run.objects.how_to_resume(str(self.folder))}"
            ) from error
        self.state.knn_is_owed = False
        self.journal.record("knn", self.state.step, epoch=epoch, **result)
        queries = f"{result['queries']:,} images"
        self.journal.say(f"epoch {epoch + 1}/{self.epochs}: kNN {result['top1']:.1f} % of {queries}{more}")
        best = result["top1"] > self.state.best_knn
        self.state.best_knn = max(self.state.best_knn, result["top1"])
        return best

    def _announce_forecast(self, steps_left: float, measured: bool, cost: float = 1.0) -> None:
        """Say, once, when the run will take long; the values are those of `Forecast.note`."""
        if said := self.forecast.note(steps_left, measured, cost):
            self.journal.say(said)

    def _announce_broken(self) -> None:
        """Say how many images were skipped, when they have become more."""
        if len(self.run.broken) > self.announced_broken:
            self.announced_broken = len(self.run.broken)
            count = counted(self.announced_broken, "broken image")
            self.journal.say(f"{count} skipped so far; which, and why: {self.folder / 'skipped.txt'}")

    def _save_when_due(self, step: int, all_processes_are_here: bool = False, best: bool = False) -> None:
        """Save when it is time to, or when asked to stop; then stop.

        Several processes vote, at the steps at which they meet anyway; a single one looks after every step.
        """
        if self.world.size > 1 and not (all_processes_are_here or self._record_is_due(step)):
            return
        late = time.monotonic() - self.last_saved >= self.config.monitor.checkpoint_minutes * 60
        stop, late, best = self.world.vote(self.interrupt.why is not None, late, best)
        finished = self.state.step == self.steps
        if not (stop or late or best or finished):
            return
        path = self._save(best)
        if stop and not finished:
            why = next(filter(None, self.world.gather_objects(self.interrupt.why)))
            self.journal.note(f"{why} at {self._in_words(self._last_step)} and saved")
            raise Interrupted(
                f"{why} at {self._in_words(self._last_step)} and saved to {path}; "
                f"go on with: {self.run.objects.how_to_resume(str(self.folder))}"
            )

    def _save(self, best: bool) -> Path:
        """Write a checkpoint. Raises CacoError instead when it would hold what no step can go on from."""
        self._stop_if_not_finite(self.state.meters.bad_step(self.world))
        if any(self.world.vote(not self.state.is_finite())):  # the loss of a step is that of the weights before it
            self._stop_if_not_finite(self._last_step, "weights are")
        contents = {
            **self.state.state_dict(self.world),
            "metrics_bytes": self.journal.sync(),
            **self.images,
            "epoch": self.state.step // self.loader.steps_per_epoch,
            "card": {**vars(self.run.card), "step": self.state.step},
        }
        self.last_saved = time.monotonic()
        step = self.state.warm_start_step + self.state.step
        if self.world.is_main:
            self.checkpoints.save(contents, step, best)
        self.world.wait()
        self.run.broken.merge(self.world)  # may end the run, which by now is saved
        return self.checkpoints.path(step)

    def _resume(self) -> tuple[int, tuple[str, ...]]:
        """Load the latest checkpoint that can be read, which the main process does.

        Return the length metrics.jsonl had then, and why newer checkpoints cannot be read.
        """
        latest: Latest = self.world.decide_in_main(self.checkpoints.latest, self._for_others)
        contents = latest.content
        check_same_images(contents, self.images, self.config.data)
        self.state.load_state_dict(contents, self.world)
        return int(contents["metrics_bytes"]), latest.problems

    def _for_others(self, latest: Latest) -> Latest:
        """Return what processes but the main one need of its checkpoint: of a divided bank each gets its part later."""
        return latest._replace(content=without_bank(latest.content)) if self.config.bank.sharded else latest

    def _stop_if_not_finite(self, step: int | None, what: str = "loss is") -> None:
        if step is not None:
            kept = [path.name for path in self.checkpoints.paths()]
            other = "" if self.config.precision == "fp32" else ", or --precision fp32"
            raise CacoError(
                f"the {what} not finite at {self._in_words(step)}; the run stops. Last good checkpoint: "
                f"{kept[-1] if kept else 'none yet'} in {self.checkpoints.folder}. Begin again, with --overwrite or another "
                f"--out, and a lower --lr or --bank.lr{other}."
            )
