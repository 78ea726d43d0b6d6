"""The survey: what it plans, that it resumes, and the table that it writes."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from pipeline import evaluate, overview, survey, train
from pipeline.compose import CONF, compose_config
from pipeline.errors import UserError
from pipeline.plan import Shelf, images_per_step, plan
from pipeline.tracking import store
from tests.test_train import REPO, SMALL

pytestmark = pytest.mark.usefixtures("runs_folder")
TINY = [s for s in SMALL if not s.startswith(("trainer.max_steps", "data.batches", "data.test_ep"))]

UNTRAINED = {"pixel_centroid", "frozen"}  # the survey trains all others


def small_survey(*overrides: str) -> list[str]:
    return [
        "learners=[protonet,maml]",
        "~images.omniglot",
        "images.glyphs=2000",
        "~episodes.omniglot",
        "episodes.glyphs=6",
        "tests=[[3,1],[3,2],[4,1]]",
        "~data.omniglot",
        "+data.glyphs.n_query=2",
        *(f"++overrides.{s}" for s in TINY if "train_n_way" not in s),
        "+overrides.data.train_n_way='${data.n_way}'",
        "heads=[]",
        *overrides,
    ]


def test_every_learner_and_head_is_introduced_by_its_name_and_paper():
    for path in [*CONF.glob("learner/*.yaml"), *CONF.glob("head/*.yaml")]:
        if path.stem not in UNTRAINED:
            assert overview.method(path).paper, path


def test_the_table_of_the_docs_is_whole_and_the_yamls_agree_with_it():
    """Every learner has its figures, beats raw pixels, and tells its user what to expect."""
    lines = (REPO / "docs/learners.md").read_text().splitlines()
    columns, *rows = [
        [cell.strip(" *") for cell in line[1:-1].split("|")]
        for line in lines
        if line.startswith("|")
    ]
    figures = {row[0]: dict(zip(columns, row, strict=True)) for row in rows if "±" in "".join(row)}
    first, second = (
        next(c for c in columns if c.endswith(f"omniglot {k}")) for k in ("5w1s", "5w5s")
    )
    floor = float(figures["pixel floor"][first].partition(" ")[0])
    wanted = {
        f"`{path.stem}`": path for path in CONF.glob("learner/*.yaml") if path.stem not in UNTRAINED
    }
    wanted |= {
        f"`baseline` `head={path.stem}`": path
        for path in CONF.glob("head/*.yaml") if "Transductive" in path.read_text()
    }  # fmt: skip
    assert set(wanted) == set(figures) - {"pixel floor"}
    for name, path in wanted.items():
        one, five = (figures[name][column].partition(" ")[0] for column in (first, second))
        assert float(one) > floor, name
        assert f"5-way 1- and 5-shot: {one} and {five} %." in path.read_text(), path
        assert all("±" in figures[name][c] for c in columns if re.search(r"\d+w\d+s$", c)), name


def test_the_budget_is_the_same_for_all():
    jobs = plan(compose_config("survey", ["images.omniglot=20000", "images.glyphs=20000"]))
    assert {job.data for job in jobs} == {"glyphs", "omniglot"}
    for job in jobs:
        part = 10_000 if job.after or job.name.endswith(" half") else 20_000
        shown = job.cfg.trainer.max_steps * images_per_step(job.cfg)
        few = 5 * images_per_step(job.cfg)  # at least a step before each of five validations
        assert shown == pytest.approx(part, abs=max(few / 2, few - part) + 1), job.name
        assert job.cfg.data.n_way == job.tests[0][0]
    shapes = {(job.learner, job.data): [] for job in jobs}
    for job in jobs:
        shapes[job.learner, job.data] += [] if job.name.endswith(" half") else job.tests
    assert all(tests == [(5, 1), (5, 5), (20, 1)] for tests in shapes.values())


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "learners=[protonett]",
            r"learners: no learner 'protonett' to train; there are .*protonet",
        ),
        ("heads=[timm]", r"heads: no head 'timm'; there are .*tim"),
        ("images.glyphs=0", r"images: found .* greater than or equal to 1"),
        ("+images.cifar=5", r"images: found glyphs, cifar; needs glyphs, as data"),
        ("half.feat=typo", r"half: no learner 'typo' to train; there are .*protonet"),
        ("heads_on=typo", r"heads_on: no learner 'typo' to train; there are .*protonet"),
        ("workers=none", r"workers: found 'none'"),
        ("+overrides.backbone.widht=8", r"protonet on glyphs: backbone.widht=8: unknown key"),
    ],
)
def test_bad_input(override, line):
    with pytest.raises(UserError, match=line):
        survey.run(compose_config("survey", [*small_survey(), override]))


def test_a_survey_goes_on_where_it_was_stopped_and_writes_its_table(monkeypatch, tmp_path, capsys):
    """Commands run in this process, and one of them fails at first."""
    commands: list[str] = []
    broken = True

    def execute(self, step, place, log):
        module, *overrides = step
        commands.append(f"{module} {overrides[0]}")
        if broken and "learner=maml" in overrides and "data.n_way=4" in overrides:
            log.write_text("it began\nerror: out of paper\n")
            return 2
        command = {"pipeline.train": train, "pipeline.evaluate": evaluate}[module]
        command.run(compose_config(module.partition(".")[2], overrides), overrides)
        return 0

    monkeypatch.setattr(survey._Workers, "_execute", execute)
    out = tmp_path / "table.md"
    overrides = small_survey(f"out={out}", "workers=1")
    with pytest.raises(UserError, match=r"maml glyphs 4-way: exit code 2 .*out of paper"):
        survey.run(compose_config("survey", overrides))
    assert [c.split()[0] for c in commands].count("pipeline.train") == 3
    assert commands[-1].startswith(("pipeline.train", "pipeline.evaluate"))
    lines = out.read_text().splitlines()
    (row,) = [line for line in lines if "`maml`" in line and line.startswith("|")]
    assert len(re.findall(r"\d+\.\d ± \d+\.\d", row)) == 2
    assert row.endswith("|  |"), "the last cell waits"
    broken, before = False, len(commands)
    survey.run(compose_config("survey", overrides))
    assert commands[before:] == ["pipeline.train learner=maml"]
    rows = [line for line in out.read_text().splitlines() if "±" in line]
    assert len(rows) == 3
    assert all(len(re.findall(r"\d+\.\d ± \d+\.\d", row)) == 3 for row in rows)
    floor, trained = rows[-1], [row.split(" | ")[0] for row in rows[:-1]]
    assert "pixel floor" in floor
    assert trained == ["| `protonet`", "| `maml`"]
    assert " transductive " in rows[1]
    before = len(commands)
    survey.run(compose_config("survey", overrides))
    assert len(commands) == before, "all is done"
    survey.run(compose_config("survey", [*overrides, "learners=[protonet]", "images.glyphs=4000"]))
    assert commands[before:] == ["pipeline.train learner=protonet", commands[-1]]
    before = len(commands)
    without = [*overrides, "learners=[protonet]", "+overrides.learner.scheduler=null"]
    survey.run(compose_config("survey", without))
    assert commands[before] == "pipeline.train learner=protonet", "a key less: another training"


def test_nothing_starts_from_a_training_that_is_not_done():
    *_, job = plan(compose_config("survey", small_survey("learners=[feat]")))
    with pytest.raises(UserError, match=r"'baseline glyphs 3-way half', which it starts from, is"):
        Shelf("survey").next_command(job)


@pytest.mark.slow
def test_ctrl_c_stores_what_is_being_trained(tmp_path):
    env = {**os.environ, "PIPELINE_MLRUNS": str(store.MLRUNS), "OMP_NUM_THREADS": "1"}
    out = tmp_path / "table.md"
    arguments = small_survey(f"out={out}", "workers=2", "images.glyphs=200000")
    command = [sys.executable, "-m", "pipeline.survey", *arguments]
    process = subprocess.Popen(command, cwd=REPO, env=env, stdout=subprocess.PIPE, text=True)
    folder = store.MLRUNS / "checkpoints"
    until = time.monotonic() + 120
    while len(list(folder.glob("*/last.ckpt"))) < 2 and time.monotonic() < until:
        time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert "wrote" in process.stdout.read()
    runs = store.connect().search_runs(["1"])
    assert {run.info.status for run in runs} == {"KILLED"}
    arguments = small_survey(
        f"out={out}", "workers=2", "images.glyphs=200000", "learners=[protonet]"
    )
    again = subprocess.run(
        [sys.executable, "-m", "pipeline.survey", *arguments],
        cwd=REPO, env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    names = [run.info.run_name for run in store.connect().search_runs(["1"])]
    assert names.count("protonet glyphs 3-way") == 1, "it was resumed"
