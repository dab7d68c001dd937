"""What each command but knn and linear (`judge.py`) does: configuration in, parts put together, result out."""

from __future__ import annotations

import sys
from pathlib import Path

from caco.after_training import Embed, Export, Report
from caco.config import Pretrain
from caco.data.folder import say_left_out
from caco.data.labels import where_labels_come_from
from caco.data.source import open_source
from caco.deliver.embed import check_features_path, write_features
from caco.deliver.export import check_export_path
from caco.deliver.export import export as export_encoder
from caco.deliver.next_steps import next_steps
from caco.deliver.report import write_report
from caco.device import choose_device
from caco.distributed.launch import launch
from caco.distributed.world import World
from caco.errors import CacoError, UsageError, counted
from caco.files import check_writable
from caco.given import open_encoder, open_images, say_broken, say_unfinished
from caco.objects import NO_OBJECTS, Objects
from caco.train.run import run_pretraining


def pretrain(options: Pretrain, objects: Objects = NO_OBJECTS) -> Path | None:
    """Pre-train as configured (`checks.check` has seen it), and say what to do next.

    Returns the path of the finished backbone, None but in the main process.
    """
    if objects.val is None and options.val and not _may_be_labelled(options):
        raise UsageError(
            f"--val {options.val} has no labels (class folders, or a label column), and the kNN check needs them: "
            "leave --val out"
        )
    if objects.val is not None and objects.val.labels is None:
        raise UsageError(
            f"--val {options.val} has no labels ({where_labels_come_from(objects.val)}), and the kNN check needs them"
        )
    path = launch(run_pretraining, options.distributed, options.device, options, objects, can_resume=True)
    if path is not None:
        print(f"The backbone is {path}. Next:\n{next_steps(options, objects.backbone is not None, objects.data)}")
    return path


def _may_be_labelled(options: Pretrain) -> bool:
    """Return whether --val has labels, or cannot be opened: then the run tells why, after what it tells first."""
    try:
        return open_source(options.val, split="val", download=options.download).labels is not None
    except CacoError:
        return True


def embed(options: Embed, objects: Objects = NO_OBJECTS) -> Path | None:
    """Write the features of every image to --out and return its path (None but in the main process)."""
    check_features_path(options.out, options.overwrite)
    return launch(_embed, options.distributed, options.device, options, objects)


def _embed(world: World, options: Embed, objects: Objects) -> Path | None:
    path = Path(options.out)
    source = open_images(options, objects.data, options.data, "train")
    features = open_encoder(world, options, objects.backbone, len(source)).features(source)
    if not world.is_main:
        return None
    say_left_out(source)
    say_broken(source, features.broken)
    if options.normalise:
        features.vectors.div_(features.vectors.norm(dim=1, keepdim=True).clamp_min(1e-12))
    write_features(path, features, source.classes)
    print(f"{path} holds {counted(len(features.vectors), 'vector')} of {counted(features.vectors.shape[1], 'number')}")
    return path


def export(options: Export) -> Path:
    """Write the encoder in another format; say how to load it, and return the file's path."""
    path = check_export_path(options.out, options.format, options.overwrite)
    how = export_encoder(Path(options.run), options.format, path, options.backbone)
    if options.format != "reference":  # which says itself how many epochs are done
        say_unfinished(options.run)
    print(f"{path} is written; load it with\n  {how}")
    return path


def report(options: Report) -> Path:
    """Write the page of a run into its folder, print and return its path."""
    if not options.run:
        raise UsageError("name a run folder first, for example: caco report runs/first")
    check_writable("RUN", Path(options.run) / "report.html")
    world = World(choose_device(options.device))
    path = write_report(
        Path(options.run),
        images=options.images,
        device=world.device,
        workers=world.worker_count("auto"),
        say=lambda text: print(text, file=sys.stderr),
    )
    print(f"The page is {path}")
    return path
