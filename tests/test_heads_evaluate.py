"""`evaluate head=`: a run's network under another head, its results beside the learner's own."""

import pytest

from pipeline import config, evaluate, report
from pipeline.compose import compose_config
from pipeline.errors import UserError
from pipeline.tracking import store
from tests.conftest import stored_table
from tests.test_learners import build
from tests.test_train import run_train

pytestmark = pytest.mark.usefixtures("runs_folder")


def run_evaluate(*overrides: str) -> dict:
    overrides = (*overrides, "inside=false")
    return evaluate.run(compose_config("evaluate", overrides), overrides)


def test_results_of_heads_stand_beside_those_of_the_learner(capsys):
    result = run_train("trainer.max_steps=10", "test_k_shot=[1]")
    run_id = result["run_id"]
    few = "head.steps=20"
    found = run_evaluate(f"run={run_id}", "head=tim", few)
    key = "test/glyphs_5w1s_TIM_steps_20"
    assert set(found) == {"run_id", f"{key}/acc", f"{key}/acc_ci95", f"{key}/floor_acc"}
    assert "ProtoNet + TIM (steps=20)" in capsys.readouterr().out
    again = run_evaluate(f"run={run_id}", "head=nearest_mean")
    assert again["test/glyphs_5w1s_NearestMean/acc"] == result["test/acc"]  # it is ProtoNet's own
    centred = run_evaluate(f"run={run_id}", "head=simple_shot", "+data=digits", "n_way=3")
    assert 0 < centred["test/digits_3w1s_SimpleShot/acc"] <= 1

    client = store.connect()
    metrics = client.get_run(run_id).data.metrics
    assert metrics["test/acc"] == metrics["test/glyphs_5w1s/acc"] == result["test/acc"]
    assert metrics[f"{key}/acc"] == found[f"{key}/acc"]
    figures = {f.path for f in client.list_artifacts(run_id, "figures")}
    assert {
        "figures/episode_glyphs_5w1s.png",
        "figures/episode_glyphs_5w1s_NearestMean.png",
    } <= figures
    table = stored_table(client, run_id)
    protocols = dict(zip(table["learner"], table["protocol"], strict=True))
    assert protocols == {
        "ProtoNet": "inductive", "PixelCentroid": "inductive",
        "ProtoNet + TIM (steps=20)": "transductive", "ProtoNet + NearestMean": "inductive",
        "ProtoNet + SimpleShot": "inductive",
    }  # fmt: skip

    overrides = [f"runs=[{run_id}]", "test_set=glyphs"]
    rankings = report.run(compose_config("report", overrides), overrides)["rankings"]
    rows = {r.protocol: set(r.rows["label"]) for r in rankings}
    assert rows["inductive"] == {"ProtoNet", "ProtoNet + NearestMean", "PixelCentroid"}
    assert rows["transductive"] == {"ProtoNet + TIM (steps=20)", "PixelCentroid"}
    pairs = next(r.pairs for r in rankings if r.protocol == "inductive")
    assert len(pairs) == 3  # of every two, episode by episode: no file was written over
    same = pairs[~pairs[["a", "b"]].isin(["PixelCentroid"]).any(axis=1)]
    assert same["difference"].tolist() == [0]


def test_a_gradient_learner_has_no_embeddings():
    cfg = compose_config("evaluate", ["run=abc", "head=tim"])
    with pytest.raises(
        UserError, match="head: works on embeddings, but the run is of MAML, which has"
    ):
        evaluate._under_head(build("maml"), cfg, trained_on=cfg, overrides=())


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        (["+head.steps=3"], ["head: found steps alone; name the head too"]),
        (["+data.root=x"], ["data: found root alone; name the data too"]),
        (["head=timm"], ["head=timm: no such option; head can be baseline, baseline_pp, bd_cspn"]),
        (["head=tim", "head.stepss=3"], ["head.stepss=3: unknown key 'stepss'; head has cond"]),
        (
            ["head=tim", "+head.bogus=3"],
            ["head.bogus: unknown key; allowed are conditional_weight"],
        ),
        (
            ["head=tim", "head.steps=x", "head.lr=-1"],
            ["head.steps: found 'x'; Input should be a valid integer", "head.lr: found -1; Input"],
        ),
        (["head=pt_map", "head.sharpness=50"], ["head.sharpness: found 50; Input should be less"]),
        (
            ["head=simple_shot", "head.features=L2"],
            ["head.features: found 'L2'; Input should be 'UN'"],
        ),
        (
            ["head=cosine", "head._target_=pipeline.heads.cosine.Sine"],
            ["head._target_: 'pipeline.he"],
        ),
    ],
)
def test_bad_heads_are_a_line_each(overrides, lines):
    with pytest.raises(UserError) as error:
        config.check_root(compose_config("evaluate", ["run=abc", *overrides]), "evaluate")
    found = str(error.value).splitlines()
    assert len(found) == len(lines), found
    for line, start in zip(found, lines, strict=True):
        assert line.startswith(start)
