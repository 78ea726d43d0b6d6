"""The main job end to end: train, track, be killed, resume, evaluate."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pipeline import evaluate, train
from pipeline.compose import compose_config
from pipeline.errors import UserError
from pipeline.tracking import store
from tests.conftest import stored_table
from tests.image_files import picture, save

pytestmark = pytest.mark.usefixtures("runs_folder")
REPO = Path(__file__).resolve().parents[1]
SMALL = [
    "data.n_train=30",
    "data.n_val=8",
    "data.n_test_kanji=2",
    "data.train_n_way=5",
    "data.batches_per_epoch=10",
    "data.val_episodes=5",
    "data.test_episodes=20",
    "backbone.width=8",
    "backbone.downsample=stride",
    "trainer.max_steps=20",
    "trainer.accelerator=cpu",
]


def run_train(*overrides: str) -> dict:
    overrides = (*SMALL, *overrides)
    return train.run(compose_config("train", overrides), overrides)


def weights(run_id: str, which: str) -> dict:
    return torch.load(store.find_checkpoint(run_id, which), weights_only=True)["state_dict"]


def test_a_run_leaves_what_a_user_needs(capsys):
    result = run_train("also_test=[digits]", "learner=maml", "data.meta_batch_size=2")
    client = store.connect()
    run = client.get_run(result["run_id"])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "MAML glyphs"
    assert run.data.params["learner.inner_lr"] == "0.2"
    assert run.data.params["data.train_n_way"] == "5"
    tags = run.data.tags
    assert tags["protocol"] == "transductive"
    assert tags["seed"] == "0"
    assert len(tags["data.fingerprint"]) == 64
    assert tags["version.torch"] == torch.__version__.partition("+")[0]
    assert {"host", "device", "git.commit", "git.dirty"} <= set(tags)
    assert {d.dataset.name for d in run.inputs.dataset_inputs} == {"glyphs", "digits"}
    curve = client.get_metric_history(result["run_id"], "val/acc")
    assert [point.step for point in curve] == [10, 20]  # steps done
    assert client.get_metric_history(result["run_id"], "train/loss")
    files = {f.path for folder in ("", "checkpoints", "figures")
             for f in client.list_artifacts(result["run_id"], folder)}  # fmt: skip
    assert {
        "config.yaml", "results.csv", "results.json", "checkpoints/best.ckpt",
        "checkpoints/last.ckpt", "figures/episode_glyphs_5w1s.png",
        "figures/classes_digits_5w5s.png",
    } <= files  # fmt: skip
    kept = client.list_artifacts(result["run_id"], "episodes")
    assert len(kept) == 4  # two sets at 1 and 5 shots, each on its own list
    table = stored_table(client, result["run_id"])
    lists = {entry.path.rpartition("_")[2].removesuffix(".csv") for entry in kept}
    assert lists == set(table["episode_list"])
    assert set(table["backbone"]) == {"Conv4-8", ""}
    assert list(table["learner"]) == ["MAML", "PixelCentroid"] * 4
    assert set(table["data"]) == {"glyphs", "digits"}
    out = capsys.readouterr().out
    assert "transductive" in out
    assert "step 20/20" in out
    assert not list((store.MLRUNS / "checkpoints").glob("*/*.ckpt"))  # uploaded, so not twice


def test_evaluate_repeats_the_test_of_training_and_takes_other_shapes_and_data():
    result = run_train()
    overrides = [f"run={result['run_id']}", "inside=false"]
    again = evaluate.run(compose_config("evaluate", overrides), overrides)
    assert result["test/acc"] == result["test/glyphs_5w1s/acc"]
    assert not any(key.startswith("test/acc") for key in again)  # which training alone writes
    for key in ("test/glyphs_5w1s/acc", "test/glyphs_5w5s/acc", "test/glyphs_5w1s/floor_acc"):
        assert again[key] == result[key]
    overrides += ["+data=digits", "k_shot=3", "episodes=10", "n_way=4"]
    other = evaluate.run(compose_config("evaluate", overrides), overrides)
    assert 0 < other["test/digits_4w3s/acc"] <= 1
    overrides = [f"run={result['run_id']}", "k_shot=1", "episodes=10", "inside=false"]
    fewer = evaluate.run(compose_config("evaluate", overrides), overrides)
    client = store.connect()
    run = client.get_run(result["run_id"])
    assert run.data.metrics["test/digits_4w3s/acc"] == other["test/digits_4w3s/acc"]
    assert run.data.metrics["test/glyphs_5w1s/acc"] == fewer["test/glyphs_5w1s/acc"]  # the latest
    assert run.data.metrics["test/acc"] == result["test/acc"]
    assert run.info.status == "FINISHED"
    kept = Path(client.download_artifacts(result["run_id"], "results.csv")).read_text()
    assert len(kept.splitlines()) == 1 + 4  # of training; each evaluation has its own
    assert len(stored_table(client, result["run_id"])) == 4 + 4 + 2 + 2


def test_best_and_not_last_checkpoint_is_tested():
    result = run_train("trainer.max_steps=40", "data.batches_per_epoch=5", "data.val_episodes=3")
    history = store.connect().get_metric_history(result["run_id"], "val/acc")
    best = max(history, key=lambda m: (m.value, -m.step))
    checkpoint = store.find_checkpoint(result["run_id"], "best")
    assert torch.load(checkpoint, weights_only=True)["global_step"] == best.step


def test_evaluate_a_checkpoint_file_without_tracking(tmp_path, capsys):
    result = run_train()
    path = store.find_checkpoint(result["run_id"], "best")
    overrides = [f"checkpoint={path}"]
    again = evaluate.run(compose_config("evaluate", overrides), overrides)
    assert again["test/glyphs_5w1s/acc"] == result["test/glyphs_5w1s/acc"]
    assert "not tracked" in capsys.readouterr().out
    junk = tmp_path / "junk.ckpt"
    junk.write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match=r"junk\.ckpt is not a readable checkpoint"):
        evaluate.run(compose_config("evaluate", [f"checkpoint={junk}"]))
    torch.save({"state_dict": {}}, junk)
    with pytest.raises(UserError, match="was not written by this pipeline"):
        evaluate.run(compose_config("evaluate", [f"checkpoint={junk}"]))


def test_the_head_of_maml_scores_no_other_number_of_ways():
    result = run_train("learner=maml", "data.meta_batch_size=1", "trainer.max_steps=10")
    with pytest.raises(UserError, match=r"n_way: 3 classes, but this MAML was trained for 5"):
        evaluate.run(compose_config("evaluate", [f"run={result['run_id']}", "n_way=3"]))


def test_unknown_run_names_the_newest():
    result = run_train("trainer.max_steps=10")
    with pytest.raises(UserError, match=rf"no run 'abc' .*{result['run_id']}"):
        evaluate.run(compose_config("evaluate", ["run=abc"]))


def test_a_resumed_run_keeps_what_it_trains():
    result = run_train("trainer.max_steps=10")
    overrides = [f"resume={result['run_id']}", "learner=maml", "trainer.max_steps=20"]
    with pytest.raises(UserError) as error:
        train.run(compose_config("train", overrides[:1]), overrides)
    lines = str(error.value).splitlines()
    assert lines[0].startswith("learner=maml: a resumed run keeps its learner; what can change is")
    assert lines[1].startswith("trainer.max_steps=20: a resumed run keeps its trainer.max_steps;")


def test_what_was_trained_on_is_no_test(tmp_path):
    """Class folders that are dealt out anew: classes of training come to the test split."""
    for i in range(12):
        for k in range(6):
            save(tmp_path / "photos" / f"class {i:02d}" / f"{k}.png", picture(100 * i + k))
    folder = [f"data.root={tmp_path / 'photos'}", "data.image_size=16", "data.channels=1"]
    shape = ["data.n_way=2", "data.n_query=2", "data.train_n_way=2", "test_k_shot=[1]"]
    small = [*SMALL[4:], *folder, *shape]
    overrides = ["data=image_folder", *(o for o in small if "data.train_n_way=5" not in o)]
    result = train.run(compose_config("train", overrides), overrides)
    resume = [f"resume={result['run_id']}"]
    train.run(compose_config("train", resume), resume)
    save(tmp_path / "photos" / "class 03" / "0.png", picture(4711))
    with pytest.raises(UserError, match=r"resume: photos is not what it was when .* began"):
        train.run(compose_config("train", resume), resume)
    overrides = [f"run={result['run_id']}", "inside=false"]
    evaluate.run(compose_config("evaluate", overrides), overrides)
    shutil.rmtree(tmp_path / "photos" / "class 03")
    overrides += ["+data=image_folder", *folder]
    for seed in range(20):  # one of these deals puts a class of training into the test split
        another = [*overrides, f"data.split_seed={seed}"]
        try:
            evaluate.run(compose_config("evaluate", another), another)
        except UserError as error:
            assert "in the training or validation split of photos" in str(error)  # noqa: PT017
            break
    else:
        raise AssertionError("no deal was refused")


def test_evaluation_repeats_the_further_test_sets_too():
    result = run_train("also_test=[digits]", "trainer.max_steps=10", "test_k_shot=[1]")
    overrides = [f"run={result['run_id']}", "episodes=5", "inside=false"]
    again = evaluate.run(compose_config("evaluate", overrides), overrides)
    assert "test/digits_5w1s/acc" in again
    alone = evaluate.run(compose_config("evaluate", [*overrides, "also_test=[]"]), overrides)
    assert "test/digits_5w1s/acc" not in alone


def test_a_training_without_a_validation_says_so():
    with pytest.raises(UserError, match="training ended before its first validation"):
        run_train("+trainer.max_time=00:00:00:00")


def test_a_finished_run_resumes_to_its_test(tmp_path, monkeypatch):
    """Its checkpoints are artifacts now; they come back, here to another folder."""
    result = run_train("trainer.max_steps=40", "data.batches_per_epoch=5", "data.val_episodes=3")
    client = store.connect()
    elsewhere = tmp_path / "elsewhere"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store.MLRUNS / 'mlflow.db'}")
    monkeypatch.setattr(store, "MLRUNS", elsewhere)
    overrides = [f"resume={result['run_id']}", "data.test_episodes=10"]
    again = train.run(compose_config("train", overrides[:1]), overrides)
    assert again["test/acc"] != result["test/acc"]  # of fewer episodes
    assert client.get_run(result["run_id"]).info.status == "FINISHED"
    config = Path(client.download_artifacts(result["run_id"], "config.yaml")).read_text()
    assert "test_episodes: 10" in config


def test_a_training_shorter_than_its_epoch_is_validated_and_tested(capsys):
    run_train("trainer.max_steps=4", "test_k_shot=[1]")
    assert "step 4/4" in capsys.readouterr().out


def test_the_headline_is_the_shape_that_was_trained():
    result = run_train("trainer.max_steps=10", "data.k_shot=5")
    assert result["test/acc"] == result["test/glyphs_5w5s/acc"]


def test_the_picture_shows_what_was_scored(monkeypatch):
    """Episode 0 of the picture is episode 0 of the table: evaluation mode for both."""
    from pipeline import figures
    from pipeline.learners.evaluation import Scorer

    shown, scored = {}, {}
    draw, score = figures.episode_figure, Scorer.score

    def keep_shown(support, query, correct, predicted, class_names, title):
        shown[title.split(",")[1].strip()] = correct.reshape(-1)
        return draw(support, query, correct, predicted, class_names, title)

    def keep_scored(self, sampler, episodes, progress):
        scores = score(self, sampler, episodes, progress)
        n_way, k_shot = sampler.shape(0)
        scored.setdefault(f"{n_way}-way {k_shot}-shot", scores.correct[0])  # the learner is first
        return scores

    monkeypatch.setattr(figures, "episode_figure", keep_shown)
    monkeypatch.setattr(Scorer, "score", keep_scored)
    run_train()
    assert shown.keys() == scored.keys() == {"5-way 1-shot", "5-way 5-shot"}
    for task, correct in shown.items():
        assert (correct == scored[task]).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("learner", ["protonet", "maml", "reptile"])
def test_the_same_on_a_gpu(learner):
    """Trains and tests there; the weights that it wrote score the same on the CPU."""
    options = [f"learner={learner}", "data.meta_batch_size=2", "also_test=[digits]"]
    result = run_train(*options, "trainer.accelerator=gpu", "data.augmentation.affine=0.1")
    run = store.connect().get_run(result["run_id"])
    assert run.data.tags["device"] == torch.cuda.get_device_name()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        overrides = [f"run={result['run_id']}", "inside=false"]
        again = evaluate.run(compose_config("evaluate", overrides), overrides)
    assert again["test/digits_5w1s/acc"] == pytest.approx(result["test/digits_5w1s/acc"], abs=0.02)


@pytest.mark.parametrize(
    "extra",
    [
        ["backbone=resnet12", "backbone.widths=[4,4,8,8]"],  # draws dropout masks
        ["learner=reptile", "data.meta_batch_size=2", "data.train_k_shot=2",
         "learner.eval_inner_steps=2", "data.train_n_query=2"],  # draws its own mini-batches
    ],
    ids=["resnet12", "reptile"],
)  # fmt: skip
def test_a_killed_run_resumes_to_the_same_weights(extra):
    """kill -9 in a process of its own, resume here; against a run that was never stopped."""
    common = [o for o in SMALL if not (o.startswith("backbone.") and "resnet12" in extra[0])]
    common += [
        *extra,
        "trainer.max_steps=40",
        "test_k_shot=[1]",
        "data.augmentation.affine=0.1",
        "data.augmentation.crop_padding=2",
        "data.augmentation.flip=true",
        "data.augmentation.jitter=0.2",
    ]
    whole = train.run(compose_config("train", common), common)

    # as many threads as here: sums in another order differ in the last bit
    env = {**os.environ, "PIPELINE_MLRUNS": str(store.MLRUNS), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pipeline.train", *common]
    child = subprocess.Popen(command, cwd=REPO, env=env, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (found := list((store.MLRUNS / "checkpoints").glob("*/last.ckpt"))):
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    run_id = found[0].parent.name
    assert torch.load(store.find_checkpoint(whole["run_id"], "last"))["global_step"] == 40
    stopped_at = torch.load(found[0], weights_only=True)["global_step"]
    assert 0 < stopped_at < 40
    assert store.connect().get_run(run_id).info.status == "RUNNING"  # nobody could say otherwise

    overrides = [f"resume={run_id}"]
    resumed = train.run(compose_config("train", overrides), overrides)
    assert resumed["run_id"] == run_id
    curve = store.connect().get_metric_history(run_id, "val/acc")
    assert sorted({m.step for m in curve}) == [10, 20, 30, 40]
    assert store.connect().get_run(run_id).info.status == "FINISHED"
    expected, actual = weights(whole["run_id"], "last"), weights(run_id, "last")
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert torch.equal(value, actual[name]), name
    assert resumed["test/acc"] == whole["test/acc"]


def test_failed_and_interrupted_runs_are_closed_as_such(monkeypatch):
    from pipeline.learners.protonet import ProtoNet

    for cause, expected, status in (
        (RuntimeError, RuntimeError, "FAILED"),
        (KeyboardInterrupt, (KeyboardInterrupt, SystemExit), "KILLED"),
    ):

        def fail(self, batch, batch_idx, cause=cause):
            raise cause("on purpose")

        monkeypatch.setattr(ProtoNet, "training_step", fail)
        with pytest.raises(expected):
            run_train()
        client = store.connect()
        experiments = [e.experiment_id for e in client.search_experiments()]
        assert client.search_runs(experiments, max_results=1)[0].info.status == status


def test_bad_data_is_reported_before_a_run_is_made():
    with pytest.raises(UserError) as error:
        run_train("data.train_n_way=31", "data.n_way=9")
    assert "data.train_n_way: 31 classes a task, but split 'train' has 30" in str(error.value)
    assert "data.n_way: 9 classes a task, but split 'val' has 8" in str(error.value)
    with pytest.raises(UserError, match=r"test set glyphs: k_shot \+ n_query: 50 \+ 15"):
        run_train("test_k_shot=[50]")
    assert not (store.MLRUNS / "mlflow.db").stat().st_size or not store.connect().search_runs(
        [e.experiment_id for e in store.connect().search_experiments()]
    )
