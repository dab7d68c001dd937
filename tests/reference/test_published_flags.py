"""The flags of the published programs: every one, in every spelling, and what they become."""

import shlex

import pytest
from tiny_imagenet import README, readme

from caco.after_training import Linear
from caco.cli import pretrain_start
from caco.config import Pretrain, Views
from caco.options import flatten, parse
from caco.recipes import find_recipe
from caco.reference import linear, main
from caco.reference.command import linear_command, pretrain_command
from caco.reference.flags import read_flags

# peers.md 3.1 and 3.2: name, short form, default.
MAIN = (
    "data=data dataset=ImageNet workers=32 log_path=train_log print_freq=10 resume= start_epoch=0 arch=resnet50 "
    "moco_dim=128 mlp_dim=2048 epochs=200 warmup_epochs=0 batch_size=256 lr=0.03 lr_final=0.0003 momentum=0.9 wd=0.0001 "
    "moco_m=0.999 moco_m_decay=0 moco_t=0.12 cluster=65536 memory_lr=3.0 memory_lr_final=0.03 mem_momentum=0.9 "
    "mem_wd=0.0001 mem_t=0.02 ad_init=1 multi_crop=0 knn_freq=1 knn_batch_size=128 knn_neighbor=20 world_size=1 rank=0 "
    "nodes_num=1 dist_url=tcp://224.66.41.62:23456 dist_backend=nccl multiprocessing_distributed=1 type=0"
)
LINEAR = (
    "arch=resnet50 workers=32 epochs=100 start_epoch=0 batch_size=4096 lr=0.1 momentum=0.9 wd=0.0 print_freq=10 "
    "world_size=-1 rank=-1 dist_url=tcp://224.66.41.62:23456 dist_backend=nccl dataset=ImageNet evaluate=False "
    "multiprocessing_distributed=False"
)


def read(arguments: str) -> Pretrain:
    return main.translate(read_flags("main.py", "", main.FLAGS, shlex.split(arguments), "_"), gpus=0, cores=8)


def read_linear(arguments: str) -> Linear:
    return linear.translate(read_flags("linear.py", "", linear.FLAGS, shlex.split(arguments), "-"), gpus=0, cores=8)


@pytest.mark.parametrize(("program", "expected"), [(main, MAIN), (linear, LINEAR)], ids=["main", "linear"])
def test_every_published_flag_has_its_published_default(program, expected):
    ours = {flag.name: str(flag.default) for flag in program.FLAGS}
    published = dict(word.split("=", 1) for word in expected.split())
    assert {name: ours[name] for name in published} == published
    lists = {flag.name: flag.default for flag in main.FLAGS if isinstance(flag.default, list)}
    assert lists == {
        "nmb_crops": [1, 6],
        "size_crops": [224, 96],
        "min_scale_crops": [0.14, 0.05],
        "max_scale_crops": [1.0, 0.14],
    }
    assert {"seed", "gpu"} <= ours.keys()


@pytest.mark.parametrize("name", README)
def test_the_readme_commands_are_the_published_recipes(name):
    recipe = name.partition(",")[0]
    config = read(README[name])
    assert config.recipe == recipe
    wanted, got = flatten(find_recipe(recipe)), flatten(config)
    different = {option for option in wanted if wanted[option] != got[option]}
    several = {"distributed.machines", "distributed.machine", "distributed.address"}
    engine = config.engine
    assert (config.precision, engine.convolution, engine.compile) == (
        "fp32",
        "direct",
        "off",
    )  # the published arithmetic
    assert different <= {
        "data",
        "val",
        "out",
        "workers",
        "precision",
        "engine.convolution",
        "engine.compile",
        *(several if config.distributed.machines > 1 else ()),
    }
    assert (config.data, config.val) == ("datasets/imagenet/train", "datasets/imagenet/val")
    assert config.distributed.machines == (1 if recipe == "imagenet-200-b1024" else 4)
    assert config.distributed.machine == int(name[-1] if "machine" in name else 0)
    if "machine" in name:
        assert config.distributed.address == "10.0.0.1:10001"


@pytest.mark.parametrize("name", README)
def test_the_printed_command_is_the_same_configuration(name):
    config = read(README[name] + " --cluster 1000 --momentum 0.8 --ad_init 0 --seed 3 --resume 'a b.pth.tar'")
    caco, command, *arguments = shlex.split(pretrain_command(config))
    assert (caco, command) == ("caco", "pretrain")
    assert parse(Pretrain, arguments, "caco pretrain", pretrain_start) == config


def test_the_printed_linear_command_is_the_same_configuration(tmp_path):
    (tmp_path / "a b.pth.tar").touch()
    config = read_linear(f"-a resnet18 --pretrained '{tmp_path}/a b.pth.tar' --data d --lr 0.025 --wd 1e-4 --size 32")
    assert parse(Linear, shlex.split(linear_command(config))[2:], "caco linear", lambda given: Linear()) == config


def test_both_spellings_and_the_short_forms_mean_the_same():
    one = read("-a resnet18 -b 64 -j 4 -p 7 --learning_rate=0.1 --weight_decay 1e-5 --multi_crop 1 --nmb_crops 1 4")
    other = read(
        "--arch resnet18 --batch-size=64 --workers 4 --print-freq 7 --lr 0.1 --wd=1e-5 --multicrop=1 --nmb-crops 1 4"
    )
    assert one == other
    assert (one.batch_size, one.monitor.log_steps, one.optimizer.weight_decay) == (64, 7, 1e-5)
    assert read_linear("--data d --batch_size 8 --dist_url=tcp://h:1") == read_linear(
        "--data d -b 8 --dist-url tcp://h:1"
    )
    assert read("--clust 128") == read("--cluster 128")  # abbreviations, as argparse allowed them


def test_the_bank_rate_stays_the_literal_one():
    config = read("--cluster 4096 --memory_lr 3 --memory_lr_final 0.5")
    assert config.bank.lr * config.bank_size / 65536 == 3
    assert config.bank.final_lr * config.bank_size / 65536 == 0.5


def test_multi_crop_changes_the_views_as_published():
    views = read(
        "--multi_crop 1 --nmb_crops 2 4 --size_crops 64 32 --min_scale_crops .2 .1 --max_scale_crops .9 .2"
    ).views
    assert views == Views(
        size=64,
        area=(0.2, 0.9),
        large=3,
        small=4,
        small_size=32,
        small_area=(0.1, 0.2),
        saturation=0.4,
        blur=(0.5, 0.5),
        solarize=(0.0, 0.0),
    )
    assert read("--nmb_crops 2 4 --size_crops 64 32").views == Views()  # only with --multi_crop 1


def test_what_has_no_effect_is_said_in_one_line(capsys):
    plain = read("")
    capsys.readouterr()
    assert read("--type 3 --mem_wd=0.1 --nodes_num 4 --dist_backend gloo --multiprocessing_distributed 0") == plain
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "--type (it only named a folder)" in said and "--mem_wd (never used" in said
    read_linear("--data d --multiprocessing-distributed --dataset x")
    assert "--multiprocessing-distributed" in capsys.readouterr().err


def test_runs_that_differ_have_different_folders():
    """The published path lacks arch, bank size, crops, seed and data: another run was then silently gone on with."""
    variants = ["", "-a resnet18", "--cluster 128", "--multi_crop 1", "--seed 1", "--data elsewhere", "--ad_init 0"]
    variants += ["--multi_crop 1 --nmb_crops 1 4", "--moco_m 0.9", "--epochs 3", "--resume x.pth.tar", "--size 96"]
    folders = [read(f"--log_path logs {variant}").out for variant in variants]
    assert len(set(folders)) == len(variants) and all(folder.startswith("logs/ImageNet/") for folder in folders)
    assert "resnet18_single-crop_epochs-200_batch-256_cluster-65536" in folders[1] and "multi-crop-2+6" in folders[3]
    free = "--log_path logs --workers 3 --knn_freq 9 --print_freq 1 --world_size 2 --dist_url tcp://h:1 --rank 1"
    assert read(free).out == folders[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--moco_k", "3"], "unknown flag --moco_k. Did you mean --moco_"),
        (["--epochs", "many"], "--epochs: invalid int value: 'many'"),
        (["--rank=[rank_id]"], "invalid int value: '[rank_id]'"),
        (["--world_size", "4", "--dist_url=tcp://[master_id]:10001"], "must be tcp://HOST:PORT"),
        (["--multi_crop", "1", "--nmb_crops", "1", "6", "2"], "each needs two numbers"),
        (["--cluster", "0"], "--cluster 0: must be at least 1"),
        (["--resume", "nowhere.pth.tar"], "--resume: there is no file nowhere.pth.tar"),
        (["--start_epoch", "200"], "nothing is left of 200 epochs"),
        (["--data", "nowhere"], "nowhere/train"),
        (["-a", "resnet5O"], "Did you mean resnet50"),
    ],
)
def test_errors_are_one_line_and_exit_status_2(arguments, said, capsys, tmp_path):
    assert main.main([*readme("imagenet-200-b1024"), f"--log_path={tmp_path}", *arguments]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("main.py: ") and said in last
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--pretraind", "x"], "unknown flag --pretraind. Did you mean --pretrained"),
        ([], "--data is missing"),
        (["--data", ".", "--pretrained", "nowhere.pth"], "--pretrained: there is no file nowhere.pth"),
        (["--data", ".", "--resume", "x"], "add --evaluate"),
        (["--data", ".", "--evaluate"], "there is no classifier"),
    ],
)
def test_linear_errors_are_one_line_and_exit_status_2(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
    assert linear.main(arguments) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("linear.py: ") and said in last


def test_help_lists_every_flag(capsys):
    assert main.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"--{flag.name}" in text for flag in main.FLAGS)
    assert linear.main(["-h"]) == 0
    text = capsys.readouterr().out
    assert "--batch-size" in text and "--batch_size" not in text.replace("--batch_size is", "")
