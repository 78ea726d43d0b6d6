"""The report: what is ranked with what, what is refused, and what it writes."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pipeline import report, sections
from pipeline.compose import compose_config
from pipeline.errors import UserError
from pipeline.paired import compare
from pipeline.tracking import run as tracking
from pipeline.tracking import store
from tests.test_train import run_train

pytestmark = pytest.mark.usefixtures("runs_folder")
EPISODES = 60


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Runs without what git and the system have to say; nothing published."""
    monkeypatch.setattr(report, "_published", list)
    monkeypatch.setattr(tracking, "environment", dict)
    monkeypatch.setattr(tracking, "start_monitor", lambda run, resumed: None)


def record(
    learner: str = "ProtoNet",
    accuracy: float = 0.8,
    seed: int = 0,
    protocol: str = "inductive",
    episode_list: str = "a" * 16,
    episodes: int = EPISODES,
    k_shot: int = 1,
    backbone: str = "Conv4-64",
    paired: bool = True,
    tags: dict | None = None,
    study: dict[str, str] | None = None,
    tested: bool = True,
    **parameters: object,
) -> str:
    """A run as training leaves it, with accuracies drawn around a mean on common episodes."""
    rng = np.random.default_rng([seed, int(1000 * accuracy)])
    difficulty = np.random.default_rng(7).normal(0, 0.08, episodes)
    columns = {
        name: (75 * (mean + difficulty + rng.normal(0, 0.02, episodes))).round().clip(0, 75) / 75
        for name, mean in ((learner, accuracy), ("PixelCentroid", 0.4))
    }
    rows = [
        {
            "learner": name, "data": "blobs", "n_way": 5, "k_shot": k_shot, "n_query": 15,
            "accuracy": round(100 * values.mean(), 2),
            "ci95": round(196 * values.std(ddof=1) / episodes**0.5, 2), "episodes": episodes,
            "protocol": protocol if name == learner else "inductive",
            "published": None, "published_source": "",
        }
        | ({"backbone": backbone if name == learner else "", "parameters": 1000, "adapt_ms": 2.5,
            "episode_list": episode_list} if paired else {})
        for name, values in columns.items()
    ]  # fmt: skip
    config = {"learner": {"name": learner, **parameters}, "data": {"seed": seed}, "seed": seed,
              "backbone": {"_target_": f"pipeline.backbones.{backbone.partition('-')[0]}"}}  # fmt: skip
    facts = {"data": "blobs", "data.fingerprint": "f" * 64, "device": "cpu", **(tags or {})}
    with tracking.tracked_run("meta-learning", f"{learner} {seed}", config, facts, None) as run:
        for step in (10, 20):
            run.log_metrics({"val/acc": accuracy - 1 / step, "train/loss": 1 / step}, step)
        run.log_metrics({"train/seconds": 75.0}, 20)
        if tested:
            run.log_table(pd.DataFrame(rows), "results.csv", "results.json")
            if paired:
                name = f"episodes/blobs_5w{k_shot}s_{episode_list}.csv"
                run.log_csv(pd.DataFrame(columns), name)
    return run.run_id


def make(*overrides: str) -> dict:
    return report.run(compose_config("report", overrides), overrides)


def by_label(ranking) -> pd.DataFrame:
    return ranking.rows.set_index("label")


def test_seeds_are_one_row_and_its_interval_is_over_them():
    ids = [record(seed=seed, accuracy=0.8 + 0.01 * seed) for seed in range(3)]
    record(learner="MatchingNet", accuracy=0.7)
    (ranking,) = make()["rankings"]
    assert list(ranking.rows["label"]) == ["ProtoNet", "MatchingNet", "PixelCentroid"]
    row = by_label(ranking).loc["ProtoNet"]
    means = [100 * store_accuracies(run_id).mean() for run_id in ids]
    assert row["accuracy"] == pytest.approx(np.mean(means), abs=0.01)
    t = 4.302653  # two degrees of freedom
    assert row["ci95"] == pytest.approx(t * np.std(means, ddof=1) / 3**0.5, abs=0.02)
    assert row["interval_over"] == f"3 seeds of {EPISODES} episodes"
    assert by_label(ranking).loc["MatchingNet", "interval_over"] == f"{EPISODES} episodes"
    assert (row["seeds"], row["parameters"], row["adapt_ms"]) == (3, 1000, 2.5)
    assert row["train_seconds"] == 75
    assert by_label(ranking)["train_seconds"].isna()["PixelCentroid"]


def store_accuracies(run_id: str, learner: str = "ProtoNet") -> np.ndarray:
    client = store.connect()
    (entry,) = client.list_artifacts(run_id, "episodes")
    return pd.read_csv(client.download_artifacts(run_id, entry.path))[learner].to_numpy()


def test_pairs_are_of_accuracies_averaged_over_seeds():
    a = [record(seed=seed) for seed in range(2)]
    b = record(learner="MatchingNet", accuracy=0.75)
    (ranking,) = make()["rankings"]
    pair = ranking.pairs.set_index(["a", "b"]).loc[("ProtoNet", "MatchingNet")]
    mean = (store_accuracies(a[0]) + store_accuracies(a[1])) / 2
    expected = compare(100 * mean, 100 * store_accuracies(b, "MatchingNet"))
    assert tuple(pair[["difference", "low", "high", "p"]]) == pytest.approx(tuple(expected))
    assert len(ranking.pairs) == 3  # with the floor


def test_the_same_seed_twice_is_no_second_seed():
    record(accuracy=0.6)
    record(accuracy=0.8)
    (ranking,) = make()["rankings"]
    row = by_label(ranking).loc["ProtoNet"]
    assert row["seeds"] == 1
    assert row["accuracy"] == pytest.approx(80, abs=3)
    assert ranking.notes == ["ProtoNet: of runs with the same seed the latest counts (1 left out)."]


def test_configurations_are_named_by_what_differs():
    record(learner="MAML", inner_lr=0.1, steps=1, also=1)
    record(learner="MAML", inner_lr=0.2, steps=1, also=2)
    record(learner="MAML", backbone="ResNet12", inner_lr=0.2, steps=1, also=2)
    (ranking,) = make()["rankings"]
    assert set(ranking.rows["label"]) == {
        "MAML Conv4-64 (also=1, inner_lr=0.1)", "MAML Conv4-64 (also=2, inner_lr=0.2)",
        "MAML ResNet12", "PixelCentroid",
    }  # fmt: skip


def test_protocols_are_ranked_apart(capsys):
    record()
    record(learner="MAML", accuracy=0.9, protocol="transductive")
    record(learner="ANIL", accuracy=0.7, protocol="transductive")
    inductive, transductive = make()["rankings"]
    assert list(inductive.rows["label"]) == ["ProtoNet", "PixelCentroid"]
    assert list(transductive.rows["label"]) == ["MAML", "ANIL", "PixelCentroid"]
    assert list(transductive.rows["mark"]) == ["best", "behind", "floor"]
    assert len(transductive.pairs) == 1
    assert "reference" in transductive.notes[-1]
    out = capsys.readouterr().out
    assert "blobs: 5-way 1-shot, inductive" in out
    assert "blobs: 5-way 1-shot, transductive" in out


def test_what_is_not_distinguishable_from_the_best_is_marked(capsys):
    record(accuracy=0.8)
    record(learner="MatchingNet", accuracy=0.799)
    record(learner="RelationNet", accuracy=0.7)
    out = make()
    (ranking,) = out["rankings"]
    assert sorted(ranking.rows["mark"][:2]) == ["best", "tied"]
    assert by_label(ranking).loc["RelationNet", "mark"] == "behind"
    pairs = ranking.pairs.set_index(["a", "b"])["p_holm"]
    best, second = ranking.rows["label"][:2]
    assert pairs[best, second] >= 0.05 > pairs[best, "RelationNet"]
    text = (out["out"] / "report.md").read_text()
    assert re.search(rf"\| {second} \|.*\| ≈ −?\d\.\d\d \[−", text)
    assert "≈: not distinguishable from the best, p ≥ 0.05" in text
    assert "≈" in capsys.readouterr().out


def test_different_episodes_are_refused_with_a_way_on():
    a = record()
    b = record(learner="MatchingNet", episodes=30, episode_list="b" * 16)
    with pytest.raises(UserError) as error:
        make()
    (line,) = str(error.value).splitlines()
    assert line.startswith("blobs 5-way 1-shot, inductive: tested on different episodes, which")
    assert f"30 episodes of 15 queries a class (list bbbbbbbb) {b} (MatchingNet)" in line
    assert f"60 episodes of 15 queries a class (list aaaaaaaa) {a} (ProtoNet)" in line
    assert (
        f"test alike with python -m pipeline.evaluate run={b} k_shot=1 episodes=60; or select with episodes=N or runs=[ID,...]"
        in line
    )
    for chosen in ("episodes=60", f"runs=[{a}]"):
        (ranking,) = make(chosen)["rankings"]
        assert list(ranking.rows["label"]) == ["ProtoNet", "PixelCentroid"]


def test_other_images_under_one_name_are_refused_too():
    record()
    record(learner="MatchingNet", episode_list="b" * 16)
    with pytest.raises(
        UserError, match=r"the images or data\.eval_seed are not the same; or select with runs"
    ):
        make()


def test_the_longest_list_that_all_share_is_taken():
    """Both were tested on 60 and on 90 episodes, one of them on 120 too."""
    for learner, lengths in (("ProtoNet", (60, 90)), ("MatchingNet", (90, 120, 60))):
        run_id = record(learner=learner, episode_list="c" * 16)
        client = store.connect()
        path = Path(client.download_artifacts(run_id, "results.json"))
        table = json.loads(path.read_text())
        frame = pd.DataFrame(table["data"], columns=table["columns"])
        for n in lengths:
            again = frame.assign(episodes=n, episode_list=f"{n:016d}", accuracy=float(n) / 2)
            client.log_table(run_id, again.to_dict("list"), "results.json")
    (ranking,) = make()["rankings"]
    assert set(ranking.rows["episodes"]) == {90}
    assert set(ranking.rows["accuracy"]) == {45}
    assert ranking.notes == ["Tests on other lists, of 60, 120 episodes, are left out."]


def test_runs_of_before_are_shown_unpaired():
    record()
    record(learner="MatchingNet", accuracy=0.7, paired=False)
    (ranking,) = make()["rankings"]
    assert by_label(ranking).loc["MatchingNet", "mark"] == "not paired"
    assert "MatchingNet" not in set(ranking.pairs["a"]) | set(ranking.pairs["b"])
    record(learner="BestNet", accuracy=0.9, paired=False)
    out = make()
    (ranking,) = out["rankings"]
    assert ranking.rows["mark"][0] == "best, not paired"
    assert "Not paired: a run made before" in (out["out"] / "report.md").read_text()


class Page(HTMLParser):
    """What a page would fetch, its headings and the cells of its tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.cells = self.pictures = 0
        self.headings: list[str] = []
        self._heading = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.fetched += [v for k, v in attrs if k in ("src", "href")]
        self.cells += tag == "td"
        self._heading = tag in ("h2", "h3")
        self.pictures += ("class", "plotly-graph-div") in attrs

    def handle_data(self, data):
        if self._heading:
            self.headings.append(data)
            self._heading = False


STATED = report._published


def test_published_values_are_those_of_conf_experiment():
    (stated,) = [p for p in STATED() if p["source"].startswith("Bertinetto et al. 2019, 72.0")]
    assert (stated["learner"], stated["data"], stated["accuracy"]) == ("ProtoNet", "cifar_fs", 72)
    assert stated["backbone._target_"] == "pipeline.backbones.Conv4"


def test_everything_is_written(tmp_path, monkeypatch):
    stated = {"learner": "ProtoNet", "data": "blobs", "n_way": 5, "k_shot": 5, "accuracy": 72.0,
              "source": "A & B_1, 100 %", "backbone._target_": "pipeline.backbones.Conv4"}  # fmt: skip
    monkeypatch.setattr(report, "_published", lambda: [stated])
    for k_shot in (1, 5):
        record(k_shot=k_shot, accuracy=0.7 + k_shot / 50, tags={"data": "<i>"})
        record(learner="Match_Net", k_shot=k_shot, accuracy=0.6)
    done = make(f"out={tmp_path / 'new' / 'folder'}")
    names = {"leaderboard.csv", "pairs.csv", "report.md", "report.tex", "report.html"}
    assert {path.name for path in done["out"].iterdir()} == names
    board = pd.read_csv(done["out"] / "leaderboard.csv")
    assert set(board["ranking"]) == {f"blobs: 5-way {k}-shot, inductive" for k in (1, 5)}
    stated_rows = board[board["published"].notna()]
    assert list(zip(stated_rows["label"], stated_rows["k_shot"], strict=True)) == [("ProtoNet", 5)]
    assert len(pd.read_csv(done["out"] / "pairs.csv")) == 6

    page = Page((done["out"] / "report.html").read_text())
    assert page.fetched == []  # scripts are in the page
    assert page.pictures == 4  # differences of two rankings, shots, curves
    assert "Accuracy against shots" in page.headings
    assert '<td class="left">&lt;i&gt;</td>' in (done["out"] / "report.html").read_text()

    tex = (done["out"] / "report.tex").read_text()
    for kind in ("table", "tabular"):
        assert tex.count(rf"\begin{{{kind}}}") == tex.count(rf"\end{{{kind}}}") == 4
    assert r"A \& B\_1, 100 \%" in tex
    assert r"Match\_Net" in tex
    assert tex.isascii()
    for body in re.findall(r"\\begin{tabular}{(\w+)}\n(.*?)\\end", tex, re.DOTALL):
        columns, lines = body
        rows = [line for line in lines.splitlines() if line.endswith(r"\\")]
        assert rows
        for line in rows:
            assert len(re.findall(r"(?<!\\)&", line)) == len(columns) - 1


def test_a_sweep_is_drawn_and_its_trials_are_not_ranked(tmp_path):
    parent = record(learner="MAML", tags={"study": "s"}, tested=False)
    for i in range(2):
        record(accuracy=0.5, seed=i, inner_lr=i, tags={"study": "s", "trial": str(i)})
    client = store.connect()
    trials = pd.DataFrame({
        "number": range(6), "state": ["COMPLETE"] * 5 + ["PRUNED"],
        "value": [0.5, 0.6, 0.55, 0.7, 0.65, 0.4], "params_learner.inner_lr": 10.0 ** -np.arange(6),
        "params_backbone.norm": [*"abaab", None],
    })  # fmt: skip
    with pytest.raises(UserError, match=r"study: 's' has no study/trials\.csv yet"):
        make("study=s")
    trials.to_csv(tmp_path / "trials.csv", index=False)
    (tmp_path / "importance.json").write_text('{"learner.inner_lr": 0.9, "backbone.norm": 0.1}')
    for name in ("trials.csv", "importance.json"):
        client.log_artifact(parent, str(tmp_path / name), "study")
    done = make("study=s")
    assert done["rankings"] == []
    page = Page((done["out"] / "report.html").read_text())
    assert page.headings == ["Sweep"]
    assert page.pictures == 3
    assert done["out"] == store.MLRUNS / "reports" / "s"
    with pytest.raises(UserError, match="runs: of meta-learning none was tested"):
        make()
    with pytest.raises(UserError, match=r"study: no study 't' in .*; there are s"):
        make("study=t")
    winner = record(tags={"study": "s"})
    (ranking,) = make("study=s")["rankings"]
    assert by_label(ranking).loc["ProtoNet", "runs"] == winner


def test_every_curve_is_that_of_its_learner(monkeypatch):
    drawn = {}
    draw = sections.curves_figure
    monkeypatch.setattr(
        sections, "curves_figure", lambda panels, *rest: drawn.update(panels) or draw(panels, *rest)
    )
    for seed in range(2):
        record(seed=seed)
    record(learner="MatchingNet", accuracy=0.7)
    make()
    assert drawn.keys() == {"val/acc", "train/loss"}
    lines = {(label, name): list(values) for label, name, values in drawn["val/acc"]}
    assert lines == {
        ("ProtoNet", "ProtoNet 0"): pytest.approx([0.7, 0.75]),
        ("ProtoNet", "ProtoNet 1"): pytest.approx([0.7, 0.75]),
        ("MatchingNet", "MatchingNet 0"): pytest.approx([0.6, 0.65]),
    }


def test_what_is_left_by_filters():
    for k_shot in (1, 5):
        record(k_shot=k_shot)
    assert [r.k_shot for r in make("k_shot=5", "n_way=5", "test_set=blobs")["rankings"]] == [5]
    with pytest.raises(UserError, match=r"none was tested on data=blob k_shot=1"):
        make("k_shot=1", "test_set=blob")


def test_a_folder_that_cannot_be_written(tmp_path):
    record()
    (tmp_path / "occupied").write_text("a file")
    with pytest.raises(UserError, match=rf"out: {tmp_path}/occupied/x cannot be written \(Not a"):
        make(f"out={tmp_path}/occupied/x")


def test_over_real_runs():
    """Two learners, one tested again on fewer episodes."""
    from pipeline import evaluate

    small = ["learner=anil", "data.meta_batch_size=1", "trainer.max_steps=10", "test_k_shot=[1]"]
    first = run_train(*small, "learner.eval_inner_steps=2")
    done = run_train(*small, "learner=fomaml", "learner.eval_inner_steps=1")
    (ranking,) = make()["rankings"]
    rows = by_label(ranking)
    assert rows.loc["ANIL", "interval_over"] == "20 episodes"
    assert rows.loc["FOMAML", "accuracy"] == pytest.approx(100 * done["test/acc"], abs=0.01)
    assert rows.loc["FOMAML", "backbone"] == "Conv4-8"
    assert rows.loc["FOMAML", "parameters"] > 1000
    assert (rows.loc[["ANIL", "FOMAML"], "train_seconds"] > 0).all()
    assert (rows["adapt_ms"] > 0).all()
    assert len(ranking.pairs) == 1
    client = store.connect()
    steps = client.get_metric_history(first["run_id"], "adapt/acc_at_step")
    assert [m.step for m in steps] == [0, 1, 2]
    assert steps[2].value == pytest.approx(first["test/acc"])  # the same 20 episodes
    assert not client.get_metric_history(done["run_id"], "adapt/acc_at_step")  # nothing to draw
    overrides = [f"run={first['run_id']}", "episodes=10", "inside=false"]
    evaluate.run(compose_config("evaluate", overrides), overrides)
    (again,) = make()["rankings"]
    assert set(again.rows["episodes"]) == {20}
