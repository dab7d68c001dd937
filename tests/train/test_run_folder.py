"""When a folder may be used for a run, and what a resumed run may change."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from caco.checks import check
from caco.config import Pretrain
from caco.errors import UsageError
from caco.options import flatten, override
from caco.train import run_folder
from caco.train.lock import LOCK, RunLock
from caco.train.run_folder import (
    FREE_TO_CHANGE,
    check_same_mathematics,
    decide_start,
    is_of_job,
    open_run_folder,
    read_config,
    write_config,
    write_environment,
)


def config(out, **values):
    return override(Pretrain(), {"data": "photos", "out": str(out), "epochs": 50, **values})


def names(folder):
    return {path.name for path in folder.iterdir()} - {LOCK}


def open_run(options):
    with RunLock() as lock:
        return open_run_folder(options, lock)


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    write_config(folder, config(folder))
    (folder / "metrics.jsonl").write_text("{}\n")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "step-00000010.pt").write_bytes(b"")
    return folder


def test_a_new_folder_is_made(tmp_path):
    open_run(config(tmp_path / "a" / "b"))
    assert (tmp_path / "a" / "b").is_dir()
    open_run(config(tmp_path / "a" / "b"))  # an empty one is as good


def test_out_is_needed():
    with pytest.raises(UsageError, match="--out is missing"):
        check(Pretrain(data="photos"))


def test_a_run_is_not_touched_unless_asked_to(run):
    with pytest.raises(UsageError, match="holds a run; go on with --resume, or delete it with --overwrite"):
        open_run(config(run))
    assert (run / "metrics.jsonl").exists()


def test_overwrite_deletes_the_run(run):
    open_run(config(run, overwrite=True))
    assert names(run) == set()


def test_overwrite_leaves_what_the_run_has_not_written(run, capsys):
    (run / "photos").mkdir()
    for name in ("photos/a.jpg", "notes.txt", "checkpoints/mine.pt"):
        (run / name).write_text("mine")
    open_run(config(run, overwrite=True))
    assert names(run) == {"photos", "notes.txt", "checkpoints"}
    assert (run / "photos/a.jpg").exists() and names(run / "checkpoints") == {"mine.pt"}
    assert "not written by the run: checkpoints, notes.txt, photos" in capsys.readouterr().err


@pytest.mark.parametrize("within", ["", "checkpoints/step-00000010.pt"])
def test_a_run_is_not_deleted_under_the_weights_it_gives(run, within):
    with pytest.raises(UsageError, match="lies in the run that --overwrite deletes"):
        open_run(config(run, overwrite=True, weights=str(run / within)))
    assert (run / "checkpoints/step-00000010.pt").exists()


def test_a_folder_that_is_a_link(run, tmp_path):
    (tmp_path / "link").symlink_to(run)
    open_run(config(tmp_path / "link", overwrite=True))
    assert (tmp_path / "link").is_symlink() and names(run) == set()


HOLDER = "import sys, time; from pathlib import Path; from caco.train.lock import RunLock; lock = RunLock(); \
lock.take(Path(sys.argv[1])); print('taken', flush=True); time.sleep(60)"


def test_one_run_at_a_time(run, monkeypatch):
    """Another process holds the folder; killed, it has let go."""
    monkeypatch.setattr("caco.train.lock.PATIENCE", 0.2)
    other = subprocess.Popen([sys.executable, "-c", HOLDER, str(run)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "taken\n"
        with RunLock() as lock, pytest.raises(UsageError, match=rf"in use by another run \(process {other.pid} on "):
            lock.take(run)
        other.kill()
        monkeypatch.undo()  # one that is killed may take a moment to be gone
        open_run(config(run, resume=True))
    finally:
        other.kill()
        other.communicate()


def test_overwrite_of_nothing_is_a_new_run(tmp_path):
    open_run(config(tmp_path / "run", overwrite=True))
    assert (tmp_path / "run").is_dir()


def test_resume_keeps_everything(run):
    open_run(config(run, resume=True))
    assert names(run) == {"config.json", "metrics.jsonl", "checkpoints"}


def test_a_run_without_a_checkpoint_begins_anew(run, capsys):
    (run / "checkpoints" / "step-00000010.pt").unlink()
    decided = decide_start(config(run, resume=True))
    assert (decided.resume, decided.overwrite) == (False, True)
    assert "had saved no checkpoint yet: it begins anew" in capsys.readouterr().err
    assert (run / "metrics.jsonl").exists()  # decided, not done
    with pytest.raises(UsageError, match=r"cannot change --lr 0\.5"):
        decide_start(config(run, resume=True, lr=0.5))


def test_a_restarted_run_computes_as_it_began(run):
    """The command of the first start says auto; what that meant is in the run's folder, and is not measured again."""
    engine = {"engine.layout": "contiguous", "engine.compile": "off"}
    write_config(run, config(run, precision="bf16", **engine))
    again = decide_start(config(run, epochs="auto", precision="auto"), restarted=True)
    assert again == config(run, resume=True, precision="bf16", **engine)
    assert decide_start(config(run, precision="fp32"), restarted=True).precision == "fp32"  # asked for: told later


def test_a_restart_does_not_go_on_with_the_run_that_was_to_be_overwritten(run):
    """torchrun and SLURM give the same command again, also when the old run had not been deleted yet."""
    overwriting = config(run, overwrite=True)
    assert decide_start(overwriting) == overwriting  # lost while it prepares: the old run is still there
    assert decide_start(overwriting, restarted=True) == overwriting
    open_run(overwriting)
    write_config(run, overwriting)
    assert names(run) == {"config.json"}
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "step-00000010.pt").write_bytes(b"")
    assert decide_start(overwriting, restarted=True) == config(run, resume=True)  # the new run


def test_a_run_that_was_spared_goes_on(run):
    decide_start(config(run, overwrite=True))
    open_run(config(run, resume=True))
    assert decide_start(config(run, overwrite=True), restarted=True).resume


@pytest.mark.parametrize("kept", ["checkpoints/best.pt", "export/backbone.safetensors"])
def test_what_a_run_has_saved_is_never_lost_to_a_resume(run, kept):
    (run / "checkpoints" / "step-00000010.pt").unlink()
    (run / kept).parent.mkdir(exist_ok=True)
    (run / kept).write_bytes(b"x")
    assert decide_start(config(run, resume=True)).resume


def test_resume_never_starts_from_scratch(tmp_path):
    with pytest.raises(UsageError, match="--resume: there is no run in"):
        open_run(config(tmp_path / "run", resume=True))
    assert not (tmp_path / "run").exists()


def test_resume_and_overwrite(run):
    with pytest.raises(UsageError, match="exclude each other"):
        check(config(run, resume=True, overwrite=True))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "content",
    [
        {"photo.jpg": b"x"},
        {"config.json": b'{"model_type": "bert", "hidden_size": 768}', "model.safetensors": b"x"},  # another program's
        {"config.json": b"[1, 2]"},
        {"config.json": b"\xff\xfe not text"},
    ],
)
def test_what_is_not_a_run_is_never_deleted(tmp_path, content, overwrite):
    folder = tmp_path / "precious"
    folder.mkdir()
    for name, data in content.items():
        (folder / name).write_bytes(data)
    with pytest.raises(UsageError, match="exists and is not a run of caco; choose another folder"):
        open_run(config(folder, overwrite=overwrite))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == content


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="exists and is not a run"):
        open_run(config(tmp_path / "file", overwrite=True))
    with pytest.raises(UsageError, match="cannot be written: Not a directory"):
        open_run(config(tmp_path / "file" / "run"))
    assert (tmp_path / "file").read_text() == "x"


def test_configuration_comes_back(tmp_path):
    values = {"views.size": 64, "views.blur": (0.5, 0.0), "bank.warm_start_steps": 5, "optimizer.name": "adamw"}
    written = config(tmp_path, resume=True, overwrite=False, **values)
    write_config(tmp_path, written)
    assert read_config(tmp_path) == dataclasses.replace(written, resume=False)  # a flag of one start, not of the run


@pytest.mark.parametrize("content", [b"", b"{", b"[]x", b'{"views": 5}', b"\xff\xfe", b'{"colour": 1}', b"[1]"])
def test_damaged_configurations_are_usage_errors(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UsageError):
        read_config(tmp_path)


def test_no_configuration(tmp_path):
    with pytest.raises(UsageError, match="there is no run in"):
        read_config(tmp_path)


OTHER_WORDS = {
    "precision": "bf16",
    "encoder.stem": "small",
    "encoder.key_momentum_schedule": "constant",
    "optimizer.name": "sgd",
    "engine.layout": "contiguous",
    "engine.convolution": "winograd",
    "engine.compile": "on",
    "engine.decoder": "gpu",
}


def another(name, value):
    """Return another value that the option can have."""
    if name in OTHER_WORDS:
        return OTHER_WORDS[name]
    if value == "auto" and name != "device":
        return 7
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple):
        return tuple(item / 2 + 0.01 for item in value)
    return f"{value}x" if isinstance(value, str) else value + 1


@pytest.mark.parametrize("name", flatten(Pretrain()))
def test_what_a_resume_may_change(name):
    """Every option there is: either it has no part in the mathematics, or changing it is refused by name."""
    saved = override(Pretrain(), {"epochs": 50})
    wanted = override(saved, {name: another(name, flatten(saved)[name])})
    is_free = name in FREE_TO_CHANGE or name.startswith(("engine.", "monitor.", "distributed."))
    if is_free and name != "engine.decoder":  # of which the pixels are others
        check_same_mathematics(saved, wanted)
    else:
        with pytest.raises(UsageError, match=rf"--resume cannot change --{name.replace('_', '-')} "):
            check_same_mathematics(saved, wanted)


def test_free_options_are_these():
    """Pinned: a name added here changes what a resume promises."""
    assert {"out", "device", "workers", "resume", "overwrite", "download", "data", "val"} == set(FREE_TO_CHANGE)


@pytest.mark.parametrize(
    ("name", "value"), [("bank.warm_start_steps", 200), ("precision", "bf16"), ("encoder.stem", "small")]
)
def test_auto_is_a_change_too(name, value):
    saved = override(Pretrain(), {"epochs": 50, name: value})
    with pytest.raises(UsageError, match=rf"cannot change --{name.replace('_', '-')} auto \(the run has {value}\)"):
        check_same_mathematics(saved, override(saved, {name: "auto"}))


def test_more_epochs_are_another_run_from_its_weights():
    saved = Pretrain(out="where/it/was", epochs=60)
    ready = (
        "caco pretrain --recipe runs/first --weights runs/first --start-epoch 60 --epochs 90 --data photos --out FOLDER"
    )
    with pytest.raises(UsageError, match=f"{ready}$"):
        check_same_mathematics(saved, Pretrain(data="photos", out="runs/first", epochs=90))
    for other in (30, "auto"):
        with pytest.raises(UsageError, match=r"start a new run for that$"):
            check_same_mathematics(saved, Pretrain(out="runs/first", epochs=other))


def test_that_command_is_pasted_as_it_is_and_a_module_needs_python():
    saved = Pretrain(epochs=60)
    with pytest.raises(UsageError, match=r"--recipe 'my run' --weights 'my run' .* --data 'my photos' --out FOLDER$"):
        check_same_mathematics(saved, Pretrain(data="my photos", out="my run", epochs=90))
    with pytest.raises(UsageError, match=r"caco\.pretrain\(\.\.\., backbone=module, recipe='my run', .*\) in Python$"):
        check_same_mathematics(saved, Pretrain(data="array", out="my run", epochs=90, backbone="own"))


def test_all_changes_are_named_at_once():
    with pytest.raises(UsageError) as caught:
        check_same_mathematics(Pretrain(), Pretrain(lr=1.0, seed=5))
    assert str(caught.value) == (
        "--resume cannot change --lr 1.0 (the run has 0.3); --seed 5 (the run has 0); start a new run for that"
    )


COMMIT = "from caco.train import run_folder; print(run_folder.__file__, run_folder._commit())"


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
@pytest.mark.parametrize(
    ("place", "is_told"), [("src", True), (".venv/lib/site-packages", False), ("vendor/caco/src", False)]
)
def test_the_commit_is_that_of_cacos_own_source(tmp_path, place, is_told):
    """Not that of a repository of the user's, below which caco is installed."""
    package = Path(run_folder.__file__).parents[1]
    shutil.copytree(package, tmp_path / place / "caco", ignore=shutil.ignore_patterns("__pycache__"))

    def answer(*command):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        environment |= {"PYTHONPATH": str(tmp_path / place), "PYTHONDONTWRITEBYTECODE": "1"}
        environment |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
        return subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout

    answer("git", "init")
    answer("git", "add", "--all", "--force")
    answer("git", "-c", "user.name=me", "-c", "user.email=me@example.org", "commit", "--message", "mine")
    head = answer("git", "rev-parse", "--short=12", "HEAD").strip()
    file, commit = answer(sys.executable, "-c", COMMIT).rsplit(maxsplit=1)
    assert Path(file).is_relative_to(tmp_path)
    assert commit == (head if is_told else "None")


def test_a_job_that_starts_again_goes_on_with_its_own_runs_only(tmp_path, monkeypatch):
    """Not with one of last month, which its script is to overwrite."""
    assert is_of_job(tmp_path, "12")  # lost before it had told
    write_environment(tmp_path, "cpu", 1)
    assert is_of_job(tmp_path, "") and not is_of_job(tmp_path, "12")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    write_environment(tmp_path, "cpu", 1)
    assert is_of_job(tmp_path, "12") and not is_of_job(tmp_path, "13")


@pytest.mark.parametrize("content", ["{", "5", ""])
def test_a_damaged_environment_stops_nothing(tmp_path, content):
    (tmp_path / "environment.json").write_text(content)
    write_environment(tmp_path, "cpu", 1)
    assert len(json.loads((tmp_path / "environment.json").read_text())) == 1


def test_environment_gets_an_entry_for_each_start(tmp_path):
    write_environment(tmp_path, "cpu", 1)
    write_environment(tmp_path, "cpu", 4)
    first, second = json.loads((tmp_path / "environment.json").read_text())
    assert (first["processes"], second["processes"]) == (1, 4)
    assert {"started", "command", "device", "python", "caco", "commit", "packages", "threads"} <= set(first)
    assert set(first["packages"]) >= {"torch", "timm", "numpy"}
