"""The command line as its users meet it: quick help, and errors of one line with exit status 2 before any work."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from caco import cli
from caco.after_training import Embed, Knn, Linear
from caco.cli import COMMANDS, main
from caco.config import Pretrain
from caco.options import flatten
from caco.recipes import find_recipe


def told(capsys, *arguments: str, status: int = 2) -> str:
    """Run caco, expect an error of one line on stderr and nothing else, and return it."""
    assert main(arguments) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1, captured.err
    assert captured.err.startswith("caco: ")
    assert "Traceback" not in captured.err
    return captured.err


def test_help_does_not_import_torch_and_is_quick():
    """Real processes; torch, numpy and Pillow may not even begin to load. Errors of parsing are as quick."""
    script = (
        "import sys; from caco.cli import main; status = main(sys.argv[1:]);"
        "heavy = {'torch', 'numpy', 'PIL', 'timm', 'torchvision'} & set(sys.modules);"
        "assert not heavy, heavy; raise SystemExit(status)"
    )
    lines = [(["--help"], 0), (["pretrain", "--help"], 0), (["pretrain", "--lrr", "1"], 2), (["recipes", "cifar"], 0)]
    lines.append((["pretrain", "--data", "x", "--out", "y", "--monitor.log-steps", "0"], 2))
    seconds = []
    for arguments, status in lines:
        began = time.monotonic()
        done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
        seconds.append(time.monotonic() - began)
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr
    assert min(seconds) < 1  # the quickest: the machine may be busy


@pytest.mark.parametrize(
    "line",
    [
        "pretrain --data {tmp}/none --out {tmp}/run",
        "pretrain --data textures:64 --val {tmp}/none --out {tmp}/run",
        "knn pixels --data {tmp}/none",
        "knn {tmp}/none --data textures:64",
        "embed {tmp}/none --data textures:64 --out {tmp}/features.npz",
        "export {tmp}/none --out {tmp}/backbone.pth",
    ],
)
def test_what_is_not_there_is_told_before_torch_is_imported(line, tmp_path):
    script = (
        "import sys; from caco.cli import main; status = main(sys.argv[1:]);"
        "assert 'torch' not in sys.modules; raise SystemExit(status)"
    )
    words = line.format(tmp=tmp_path).split()
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert f"{tmp_path}/none" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_exit_status_of_a_real_process():
    done = subprocess.run([sys.executable, "-m", "caco", "pretain"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "caco: there is no command 'pretain'. Did you mean pretrain? (all: caco --help)\n"


def test_overview_names_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"caco {name} " in text for name in COMMANDS)
    assert main([]) == 2  # nothing was done


def test_version(capsys):
    import caco

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"caco {caco.__version__}\n"


def test_the_program_tells_the_same_exit_statuses_as_the_reference():
    told = re.search(r"Exit status: (.*)\.", cli.__doc__, re.DOTALL)[1].split("·")
    table = (Path(__file__).parents[1] / "docs/commands.md").read_text()
    assert [status.split()[0] for status in told] == re.findall(r"^\| (\d+) \|", table, re.MULTILINE)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys):
    assert main([name, "--help"]) == 0
    captured = capsys.readouterr()
    assert f"caco {name}" in captured.out
    assert captured.err == ""


@pytest.mark.parametrize("name", ["knn", "linear", "embed", "export"])
def test_help_begins_with_all_that_the_command_takes(name, capsys):
    main([name, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: caco {name} RUN|FILE [options]\n")


@pytest.mark.parametrize(("name", "kind"), {"pretrain": Pretrain, "knn": Knn, "linear": Linear, "embed": Embed}.items())
def test_help_lists_every_option_with_its_default(name, kind, capsys):
    main([name, "--help"])
    entries = [" ".join(entry.split()) for entry in re.split(r"\n  (?=-)", capsys.readouterr().out)]
    start = find_recipe(Pretrain.recipe) if kind is Pretrain else kind()
    for option, default in flatten(start).items():
        if option == "run":
            continue
        flag = f"--{option}".replace("_", "-")
        (entry,) = [entry for entry in entries if entry.split(" ")[0].rstrip(",") == flag]
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default) or "none"
        assert f" [{shown or 'none'}]" in entry, entry
        assert len(entry.rpartition(" [")[0].split()) > 4, entry  # the option, its type, and words


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("pretrain --lrr 0.1", "unknown option --lrr. Did you mean --lr"),
        ("pretrain --bank.sise 5", "Did you mean --bank"),
        ("pretrain --batch 5", "--batch-size"),
        ("pretrain --epochs many", "'many' is neither a number nor auto"),
        ("pretrain --precision fp16", "'fp16' is not one of auto, fp32, bf16. Did you mean "),
        ("pretrain --recipe cifr", "Did you mean cifar"),
        ("pretrain photos", "what is 'photos' for?"),
        ("pretrain", "--data is missing"),
        ("pretrain --resume --out {tmp}/none", "there is no run in {tmp}/none"),
        ("pretrain --data {tmp} --out {tmp}/r --resume --overwrite", "there is no run"),
        ("pretrain --data {tmp} --out {tmp}/r --batch-size 1", "at least 2 images"),
        ("pretrain --data {tmp} --out {tmp}/r --batch-size 0", "--batch-size 0: must be at least 1"),
        ("pretrain --data {tmp} --out {tmp}/r --bank-size 1", "--bank-size 1: must be at least 2"),
        ("pretrain --data {tmp} --out {tmp}/r --epochs 0", "--epochs 0: must be at least 1"),
        ("pretrain --data {tmp} --out {tmp}/r --seed -1", "--seed -1: must be at least 0"),
        ("pretrain --data {tmp} --out {tmp}/r --lr nan", "--lr nan: must be a finite number"),
        ("pretrain --data {tmp} --out {tmp}/r --lr -1", "--lr -1.0: must be above 0"),
        ("pretrain --data {tmp} --out {tmp}/r --views.large 1", "two large views"),
        (
            "pretrain --data {tmp} --out {tmp}/r --views.size 160 --views.evaluation-resize 100",
            "--views.evaluation-resize 183",
        ),
        ("pretrain --data {tmp} --out {tmp}/r --views.area 1 0.2", "the first must be the smaller"),
        ("pretrain --data {tmp} --out {tmp}/r --views.gray 2", "between 0 and 1"),
        ("pretrain --data {tmp} --out {tmp}/r --views.std 0 1 1", "--views.std 0.0: must be above 0"),
        ("pretrain --data {tmp} --out {tmp}/r --bank.temperature 0", "must be above 0"),
        ("pretrain --data {tmp} --out {tmp}/r --monitor.log-steps 0", "must be at least 1"),
        ("pretrain --data {tmp} --out {tmp}/r --monitor.held-out 1", "above 0 and below 1"),
        ("knn x --neighbours 0", "must be at least 1"),
        ("knn x --data y --temperature 0.01", "--temperature 0.01: must be at least 0.0125"),
        ("knn x --held-out 1.5", "above 0 and below 1"),
        ("pretrain --data {tmp} --out {tmp}/r --bank.lr -1", "--bank.lr -1.0: must be at least 0"),
        ("pretrain --data {tmp} --out {tmp}/r --bank.final-lr -1", "--bank.final-lr -1.0: must be at least 0"),
        (
            "pretrain --data {tmp} --out {tmp}/r --optimizer.final-lr -1",
            "--optimizer.final-lr -1.0: must be at least 0",
        ),
        ("pretrain --data {tmp} --out {tmp}/r --bank.lr 1e45", "--bank.lr 1e+45: must be at most 1e+30"),
        ("pretrain --data {tmp} --out {tmp}/r --optimizer.weight-decay 1e39", "must be at most 1e+30"),
        ("pretrain --data {tmp} --out {tmp}/r --views.hue 0.6", "--views.hue 0.6: must be at most 0.5"),
        ("pretrain --data {tmp} --out {tmp}/r --views.hue -0.1", "--views.hue -0.1: must be at least 0"),
        ("pretrain --data {tmp} --out {tmp}/r --views.contrast -1", "must be at least 0"),
        ("pretrain --data {tmp} --out {tmp}/r --views.brightness -1", "must be at least 0"),
        ("pretrain --data {tmp} --out {tmp}/r --views.saturation -1", "must be at least 0"),
        ("pretrain --data {tmp} --out {tmp}/r --views.blur-sigma 0 1", "--views.blur-sigma 0.0: must be above 0"),
        ("pretrain --data {tmp} --out {tmp}/r --views.area 0 1", "--views.area 0.0: must be above 0"),
        ("pretrain --data {tmp} --out {tmp}/r --monitor.knn-epochs -1", "must be at least 0"),
        ("pretrain --data {tmp} --out {tmp}/r --monitor.knn-first-epochs -1", "must be at least 0"),
        ("pretrain --data {tmp} --out {tmp}/r --seed 99999999999999999999", "must be at most 9223372036854775807"),
        ("pretrain --data {tmp} --out {tmp}/r --distributed.processes 0", "must be at least 1"),
        ("pretrain --data {tmp} --out {tmp}/r --distributed.machine 1", "the last of 1 has the number 0"),
        ("pretrain --data {tmp} --out {tmp}/r --monitor.tensorboard False", "a no is --no- and its name"),
        ("report x --images 1", "--images 1: must be at least 2"),
        ("knn", "name a run folder or a backbone file first, for example: caco knn"),
        ("linear --neighbours 3", "unknown option --neighbours"),
        ("export --format timm", "for example: caco export runs/first --out"),
        ("knn x --weights y --data z", "name one encoder, not two"),
        ("export --weights timm:resnet18 --out z.pth", "timm has it already"),
        ("knn x --data z --mean 0.5", "--mean 0.5: must be three numbers, one for each channel"),
        ("linear x --data z --std 0.5 0 0.5", "--std 0.0: must be above 0"),
        ("embed --weights x", "--data is missing"),
        ("knn x --batch-size -3", "must be at least 1"),
        ("linear x --epochs 0", "must be at least 1"),
        ("linear x --protocol refrence", "Did you mean reference"),
        ("linear x --data y --weight-decay 0.1", "--weight-decay: only the published protocol has it"),
        ("embed x y", "what is 'y' for?"),
        ("recipes nope", "There are: "),
        ("recipes cifr", "Did you mean cifar"),
        ("recipes a b", "one name, not 2"),
        ("pretrian", "Did you mean pretrain"),
    ],
)
def test_errors_of_the_words_alone(line, words, capsys, tmp_path):
    error = told(capsys, *line.format(tmp=tmp_path).split())
    assert words.format(tmp=tmp_path) in error
    assert list(tmp_path.iterdir()) == []  # nothing was begun


def test_unset_variables(capsys):
    assert "what is '' for?" in told(capsys, "pretrain", "")
    assert "there is no command ''" in told(capsys, "")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("pretrain --data {tmp}/nope --out {tmp}/r", "{tmp}/nope: no such file or folder"),
        ("pretrain --data texture --out {tmp}/r", "Did you mean textures"),
        ("pretrain --data textures:128", "--out is missing"),
        ("pretrain --data textures:128 --out {tmp}/r --backbone resnet19", "Did you mean resnet"),
        (
            "pretrain --data textures:128 --out {tmp}/r --device cdua",
            "--device cdua: no such kind of device. Did you mean cuda?",
        ),
        ("pretrain --data textures:128 --out {tmp}/r --device gpu", "no such kind of device. Did you mean cuda?"),
        ("pretrain --data textures:128 --out {tmp}/r --device GPU:1", "no such kind of device. Did you mean cuda:1?"),
        (
            "pretrain --data textures:128 --out {tmp}/r --weights {tmp}/none.pt",
            "there is no run folder or file {tmp}/none.pt",
        ),
        ("pretrain --data textures:128 --out {tmp}/taken", "{tmp}/taken exists and is not a run of caco"),
        ("pretrain --data textures:128 --out {tmp}/taken/a.txt", "exists and is not a run of caco"),
        (
            "pretrain --data textures:128 --out {tmp}/taken/a.txt/r",
            "a.txt/r/config.json cannot be written: Not a directory",
        ),
        (
            "pretrain --data textures:128 --out {tmp}/r --backbone test_vit --views.size 100",
            "does not take pictures of 100 x 100 pixels: Input height (100) should be divisible by patch size (16)",
        ),
        (
            "pretrain --data textures:128 --out {tmp}/r --backbone test_vit --views.small 2 --views.small-size 97",
            "does not take pictures of 97 x 97 pixels",
        ),
        (
            "pretrain --data textures:128 --out {tmp}/r --encoder.stem small",
            "test_resnet has no ResNet stem to replace",
        ),
        ("knn", "name a run folder or a backbone file"),
        ("knn {tmp}/none", "--data is missing"),
        ("knn {tmp}/none --data textures:64", "there is no run folder or file {tmp}/none"),
        ("knn {tmp}/taken --data textures:64", "holds no finished backbone"),
        ("knn {tmp}/taken/a.txt --data textures:64", "a.txt is not a torch file, or is damaged"),
        ("knn random --data textures:64", "--backbone resnet18"),
        ("knn pixel --data textures:64", "there is no run folder or file pixel. Did you mean pixels?"),
        ("knn random --backbone resnet19 --data textures:64", "Did you mean resnet"),
        ("knn pixels --data textures:64 --out x.csv", "the result is written as .json"),
        ("linear pixels --data textures:64 --protocol reference", "the reference protocol judges encoders, not pixels"),
        ("embed pixels --data textures:64", "--out is missing"),
        ("embed pixels --data textures:64 --out x.csv", "written as .npz or .parquet"),
        ("embed {tmp}/none --data textures:64 --out x.npz", "there is no run folder or file"),
    ],
)
def test_errors_of_names_and_files(line, words, capsys, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "a.txt").write_text("somebody's notes\n" * 9)
    words = words.format(tmp=tmp_path)
    arguments = line.format(tmp=tmp_path).split()
    if arguments[0] == "pretrain" and "--backbone" not in arguments:
        arguments += ["--backbone", "test_resnet"]
    if arguments[:2] == ["knn"]:
        arguments += ["--data", "textures:64"]
    if arguments == ["knn"]:
        arguments = ["knn", "--data", "textures:64"]
    error = told(capsys, *arguments)
    assert words in error
    assert not (tmp_path / "r").exists()
    assert (tmp_path / "taken" / "a.txt").read_text() == "somebody's notes\n" * 9
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ('{"data": "my photos", "val": "v"}', ". {tmp} was trained with --data 'my photos' --val v"),
        ('{"data": "photos", "val": ""}', ". {tmp} was trained with --data photos"),
        ("{}", "pictures)"),
        ("[]", "pictures)"),
        ("nonsense", "pictures)"),
    ],
)
def test_without_images_those_of_the_run_are_named(config, words, capsys, tmp_path):
    (tmp_path / "config.json").write_text(config)
    assert told(capsys, "knn", str(tmp_path)).rstrip().endswith(words.format(tmp=tmp_path))


def test_what_the_system_refuses_is_one_line_too(capsys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    line = ["knn", "pixels", "--data", "textures:40", "--size", "8", "--out", str(tmp_path / "file" / "x.json")]
    error = told(capsys, *line)
    assert f"--out: {tmp_path}/file/x.json cannot be written: Not a directory" in error


def test_a_stray_name_that_is_there_was_a_pattern(capsys, tmp_path):
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).touch()
    error = told(capsys, "pretrain", "--data", *map(str, tmp_path.iterdir()))
    assert "what is '" in error and "Quote a pattern ('photos/*.jpg'), or name the folder" in error


def test_a_line_break_in_a_name_does_not_break_the_line(capsys, tmp_path):
    assert "no such file" in told(capsys, "knn", "pixels", "--data", f"{tmp_path}/one\ntwo")


@pytest.mark.parametrize("processes", ["1", "2"])
def test_what_a_terminal_cannot_show_is_printed_as_escapes(tmp_path, processes):
    line = [
        "knn",
        "pixels",
        "--data",
        "textures:40",
        "--size",
        "8",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "été.json"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "caco", *line, "--distributed.processes", processes],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("\\xe9t\\xe9.json\n")
    assert (tmp_path / "été.json").exists()


def with_no_reader(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run caco with a pipe as its output that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    words = [sys.executable, "-m", "caco", *arguments]
    done = subprocess.run(words, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    return done


@pytest.mark.parametrize("line", ["recipes", "recipes cifar", "recipes --help", "--help", "--version", "knn --help"])
def test_a_reader_that_leaves_is_no_error(line):
    done = with_no_reader(*line.split())
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-"])
def test_an_output_that_was_never_there_is_no_error(closed):
    """Some schedulers and daemons start a program without an output."""
    line = f"{sys.executable} -m caco --version {closed}"
    assert subprocess.run(["sh", "-c", line], capture_output=True, timeout=60).returncode == 0


def test_a_result_that_nobody_gets_is_an_error():
    done = with_no_reader("knn", "pixels", "--data", "textures:40", "--size", "8", "--device", "cpu")
    assert (done.returncode, done.stderr) == (1, "caco: not all was told: whoever read the output has left\n")


@pytest.mark.parametrize(("policy", "expected"), [(None, "10000"), ("ACTIVE", None)])
def test_threads_do_not_spin_for_long_unless_told_to(policy, expected, monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "")  # so that it is put back afterwards
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if policy:
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    assert main(["--version"]) == 0
    assert os.environ.get("GOMP_SPINCOUNT") == expected
