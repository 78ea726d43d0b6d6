"""The commands as a user types them: exit codes, one line a problem, the README."""

import importlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.tracking import store

REPO = Path(__file__).resolve().parents[1]
README = (REPO / "README.md").read_text()


@pytest.fixture
def shell(runs_folder, tmp_path):
    """Runs `python -m pipeline...` in a folder of its own, on a store of its own."""

    def run(command: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", *command.split()],
            cwd=tmp_path,
            env={
                **os.environ,
                "PYTHONPATH": str(REPO),
                "PIPELINE_MLRUNS": str(runs_folder),
                "OMP_NUM_THREADS": "1",
                **env,
            },
            capture_output=True,
            text=True,
            timeout=240,
        )

    return run


@pytest.fixture
def typed(runs_folder, monkeypatch, capsys):
    """The same in this process, without the seconds that an import of torch takes."""

    def run(command: str) -> tuple[object, list[str]]:
        module, *arguments = command.split()
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        name = module.removeprefix("pipeline.")
        with pytest.raises(SystemExit) as stop:
            cli.main(name, importlib.import_module(module).run)
        return stop.value.code, capsys.readouterr().err.splitlines()

    return run


def test_commands_are_listed_and_help_is_quick(shell):
    listed = shell("pipeline")
    assert listed.returncode == 0
    commands = re.findall(r"python -m (pipeline\.\w+)", listed.stdout)
    names = ["train", "sweep", "evaluate", "adapt", "register", "report", "survey", "demo", "ui"]
    assert commands == [f"pipeline.{name}" for name in names]
    for command in commands:
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            done = shell(f"{command} --help")
            seconds.append(time.perf_counter() - start)
        assert done.returncode == 0
        assert f"python -m {command}" in done.stdout
        assert min(seconds) < 2  # 0.3 s on a quiet machine


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['train', '--help']; import pipeline.train as t; t.main('train', t.run);"
        "heavy = {'torch', 'pytorch_lightning', 'mlflow', 'pandas', 'matplotlib'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (
            "pipeline.train data.n_way=five learner=maml learner.inner_lrr=1",
            ["learner.inner_lrr=1: unknown key 'inner_lrr'; learner has adapted,", "data.n_way: found 'five'"],
        ),
        ("pipeline.train learner=mamml", ["learner=mamml: no such option; learner can be anil,"]),
        ("pipeline.train bogus=1", ["bogus=1: unknown key 'bogus'; train has also_test,"]),
        ("pipeline.train data=image_folder", ["data.root: needs a value"]),
        (
            "pipeline.train data=image_folder data.root=/no/such",
            ["/no/such"],
        ),
        (
            "pipeline.train also_test=[nonsense,digits,rubbish]",
            ["also_test: data=nonsense: no such option", "also_test: data=rubbish: no such option"],
        ),
        ("pipeline.train resume=nonsense", ["run: no run 'nonsense'"]),
        ("pipeline.train resume= learner=maml", ["resume: found ''; give the id of a stopped"]),
        ("pipeline.train resume=5", ["resume: found 5; give the id of a stopped"]),
        ("pipeline.train data.root=~/photos", ["data.root=~/photos: cannot be read; a value with"]),
        ("pipeline.train also_test=[{data:digits,n_way:10}]", ["also_test: n_way: all test sets take that of data.n_way"]),
        ("pipeline.train also_test=null", ["also_test: found None; Input should be a valid list"]),
        ("pipeline.train +n_way=3", ["n_way: unknown key; allowed are also_test, backbone, compile,"]),
        ("pipeline.train +backbone.image_size=64", ["backbone.image_size: unknown key; allowed are"]),
        ("pipeline.train learner._target_=pipeline.learners.protonet",
         ["learner._target_: 'pipeline.learners.protonet' cannot be"]),
        ("pipeline.train experiment=typo", ["experiment=typo: no such option; experiment can be"]),
        ("pipeline.train learner=null", ["learner=null: no such option; learner can be anil,"]),
        ("pipeline.train +data=digits", ["+data=digits: write data=digits"]),
        ("pipeline.train also_test=[digits", ["also_test=[digits: "]),
        ("pipeline.train also_test=[{data:omniglot,rooot:x}]", ["also_test: Key 'rooot' is not in"]),
        ("pipeline.evaluate run=abc learner=maml", ["learner=maml: evaluate takes no learner"]),
        ("pipeline.adapt support=x learner=maml", ["learner=maml: adapt takes no learner"]),
        ("pipeline.demo learner=maml", ["learner=maml: demo takes no learner"]),
        ("pipeline.evaluate run=abc data=digits", ["data=digits: write +data=digits"]),
        ("pipeline.evaluate run=", ["run, checkpoint: found run=, checkpoint=None; give one"]),
        ("pipeline.evaluate", ["run, checkpoint: found run=None, checkpoint=None; give one of them"]),
        ("pipeline.evaluate checkpoint=none.ckpt", ["checkpoint: no file none.ckpt"]),
        ("pipeline.adapt data=glyphs support=x", ["data=glyphs: adapt takes no data"]),
        ("pipeline.adapt support=x name=a/b alias=v1",
         ["name: found 'a/b'; the name of a model has no / and", "alias: found 'v1'; an alias has"]),
        ("pipeline.register", ["name: needs a value (none is given)"]),
        ("pipeline.register run=typo name=x", ["run: no run 'typo' in sqlite:///"]),
        ("pipeline.register run=a checkpoint=b name=x", ["run, checkpoint: found both, a and b;"]),
        ("pipeline.report experiment=typo", ["experiment: no experiment 'typo' in sqlite:///"]),
        ("pipeline.report runs=[typo]", ["run: no run 'typo' in sqlite:///"]),
        ("pipeline.report study=typo", ["study: no study 'typo' in sqlite:///"]),
        ("pipeline.report experiment=Default", ["runs: of Default none was tested"]),
        ("pipeline.report runs=[]", ["runs: found []; List should have at least 1 item"]),
        ("pipeline.report k_shot=one", ["k_shot: found 'one'; Input should be a valid integer"]),
        ("pipeline.report bogus=1", ["bogus=1: unknown key 'bogus'; report has episodes, experiment,"]),
    ],
)  # fmt: skip
def test_bad_input_is_a_line_each_and_exit_code_2(typed, command, expected):
    code, lines = typed(command)
    assert code == 2
    assert len(lines) == len(expected), lines
    for line, start in zip(lines, expected, strict=True):
        assert line.startswith("error: ")
        assert start in line


def test_full_traceback_on_request(shell):
    command = "pipeline.evaluate checkpoint=none.ckpt"
    short = shell(command)
    assert (short.returncode, short.stderr) == (2, "error: checkpoint: no file none.ckpt\n")
    whole = shell(command, HYDRA_FULL_ERROR="1")
    assert whole.returncode == 1
    assert "Traceback" in whole.stderr


def test_mlruns_that_cannot_be_written(typed, tmp_path, monkeypatch):
    (tmp_path / "occupied").write_text("a file, not a folder")
    monkeypatch.setattr(store, "MLRUNS", tmp_path / "occupied")
    code, lines = typed("pipeline.train learner=pixel_centroid")
    assert code == 2
    assert lines[-1].startswith(f"error: {tmp_path}/occupied: cannot be written")


def test_a_server_that_does_not_answer(typed, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    code, lines = typed("pipeline.train learner=pixel_centroid")
    assert code == 2
    assert lines[-1].startswith(
        "error: MLFLOW_TRACKING_URI: no MLflow server answers at http://127.0.0.1:9"
    )


def test_readme_commands_compose():
    """Every command line of the README fits the configuration it names."""
    from pipeline import config
    from pipeline.compose import compose_config
    from pipeline.study import settings

    pattern = r"^ {4}python -m pipeline\.(train|sweep|evaluate|adapt|report|demo) ?(.*)$"
    lines = re.findall(pattern, README, re.MULTILINE)
    named = {"train", "sweep", "evaluate", "adapt", "report", "demo"}
    assert {command for command, _ in lines} == named
    for command, rest in lines:
        overrides = rest.split("#")[0].split()
        cfg = compose_config(command, overrides)
        match command:
            case "train":
                config.check(cfg)
            case "sweep":
                settings.read(cfg, overrides)
            case _:
                config.check_root(cfg, command)


def test_readme_tour_by_subprocess(shell):
    """The four steps as the README has them, made small: train, then evaluate on other data."""
    small = (
        "data.n_train=30 data.n_val=8 data.n_test_kanji=2 data.test_episodes=5 data.val_episodes=5"
    )
    steps = "trainer.max_steps=4 data.batches_per_epoch=2 data.meta_batch_size=1 backbone.width=8"
    trained = shell(f"pipeline.train learner=maml learner.inner_lr=0.2 {small} {steps}")
    assert trained.returncode == 0, trained.stderr
    run_id = re.findall(r"^run (\w{32});", trained.stdout, re.MULTILINE)[0]
    scored = shell(f"pipeline.evaluate run={run_id} +data=digits k_shot=5 episodes=5")
    assert scored.returncode == 0, scored.stderr
    assert "digits" in scored.stdout
    assert "5-way 5-shot" in scored.stdout
