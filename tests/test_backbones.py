"""Backbones: sizes, norms, and equality with networks written out in the papers' order."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipeline import config
from pipeline.backbones import Conv4, DropBlock, ResNet12
from pipeline.blocks import (
    BatchStatsNorm,
    ConvBlock,
    FirstBlock,
    conv_block,
    is_transductive,
    make_norm,
)
from pipeline.compose import compose_config
from pipeline.errors import UserError

BACKBONES = sorted(p.stem for p in Path(__file__).parents[1].glob("conf/backbone/*.yaml"))


WITH_NORM = [b for b in BACKBONES if "norm" in compose_config("train", [f"backbone={b}"]).backbone]


@pytest.mark.parametrize(
    ("name", "norm"),
    [(name, norm) for name in WITH_NORM for norm in ("batch", "batch_stats", "group", "none")]
    + [(name, None) for name in BACKBONES if name not in WITH_NORM],
)
def test_embeddings_have_the_promised_size(name, norm):
    cfg = compose_config(
        "train", [f"backbone={name}", *([f"backbone.norm={norm}"] if norm else [])]
    )
    config.check(cfg)
    learner = config.build_learner(cfg, (3, 32, 32))
    out = learner.eval().embed(torch.rand(2, 3, 32, 32))
    assert out.shape == (2, learner.backbone.out_dim)
    assert is_transductive(learner) == (norm == "batch_stats")


@pytest.mark.parametrize(("size", "downsample", "out"), [
    (28, "max_pool", 8), (84, "max_pool", 8 * 25), (28, "stride", 8 * 4), (10, "stride", 8),
])  # fmt: skip
def test_conv4_sizes(size, downsample, out):
    net = Conv4(1, size, 8, "batch", downsample)
    assert net.out_dim == out
    assert net(torch.rand(3, 1, size, size)).shape == (3, out)


@pytest.mark.parametrize(("halvings", "downsample", "size"), [
    (2, "max_pool", 7), (2, "stride", 7), (3, "stride", 4), (0, "max_pool", 28),
])  # fmt: skip
def test_conv4_keeps_its_maps_after_the_last_halving(halvings, downsample, size):
    net = Conv4(1, 28, 8, "batch", downsample, halvings)
    assert net.out_shape == (8, size, size)
    x = torch.rand(2, 1, 28, 28)
    assert net(x).shape == (2, net.out_dim)
    maps = net(x).unflatten(1, net.out_shape)  # as a plain forward of the blocks leaves them
    torch.testing.assert_close(maps, net.blocks(x))


def test_conv4_needs_room_for_four_pools():
    with pytest.raises(
        UserError, match=r"16 px or more, found 14; use backbone\.downsample=stride"
    ):
        Conv4(1, 14, 8, "batch", "max_pool")


def papers_block(
    block: ConvBlock, x: torch.Tensor, training: bool, downsample: str
) -> torch.Tensor:
    """Convolution, norm, ReLU, pooling, in that order and by torch's own operators."""
    conv, norm = block.conv, block.norm
    y = F.conv2d(x, conv.weight, conv.bias, block.stride, padding=1)
    running = (
        (norm.running_mean, norm.running_var) if hasattr(norm, "running_mean") else (None,) * 2
    )
    if hasattr(norm, "eps") and not isinstance(norm, nn.GroupNorm):
        use_batch = training or running[0] is None
        y = F.batch_norm(y, *running, norm.weight, norm.bias, training=use_batch, eps=norm.eps)
    else:
        y = norm(y)
    y = torch.relu(y)
    return F.max_pool2d(y, 2) if downsample == "max_pool" else y


@pytest.mark.parametrize("downsample", ["max_pool", "stride", "none"])
@pytest.mark.parametrize("norm", ["batch", "batch_stats", "group", "none"])
@pytest.mark.parametrize(("channels", "size"), [(1, 14), (1, 15), (3, 14), (8, 14)])
def test_a_block_equals_the_papers_order_in_value_and_two_derivatives(
    channels, size, norm, downsample
):
    torch.manual_seed(0)
    block = conv_block(channels, 8, norm, downsample, first=True).double()
    assert isinstance(block, FirstBlock) == (channels < 4 and norm.startswith("batch"))
    with torch.no_grad():
        for parameter in block.norm.parameters():
            parameter.normal_()  # scales of both signs
    twin = copy.deepcopy(block)
    parameters, others = list(block.parameters()), list(twin.parameters())
    for training in (True, True, False):  # the running statistics of two steps are then used
        block.train(training)
        x = torch.randn(5, channels, size, size, dtype=torch.float64) + 1
        results = []
        for out, given in (
            (block(x), parameters),
            (papers_block(twin, x, training, downsample), others),
        ):
            first = torch.autograd.grad(
                (out**2 * out.detach().cos()).sum(), given, create_graph=True
            )
            second = torch.autograd.grad(sum((g**2).sum() for g in first), given)
            results.append((out, *first, *second))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
    for ours, theirs in zip(block.buffers(), twin.buffers(), strict=True):
        if ours.dtype.is_floating_point:  # torch counts steps in the module, not in F.batch_norm
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_statistics_stay_precise_in_mixed_precision():
    """White images with faint strokes: in bfloat16 their variance would be lost."""
    torch.manual_seed(0)
    block, x = conv_block(1, 8, "batch_stats", "max_pool", first=True), torch.ones(4, 1, 16, 16)
    x += 0.01 * torch.randn_like(x)
    exact = block(x)
    with torch.autocast("cpu", torch.bfloat16):
        mean, var = block._moments(x)
        out = block(x)
    assert mean.dtype == var.dtype == torch.float32
    assert torch.equal(var, block._moments(x)[1])
    assert out.dtype == torch.bfloat16
    assert (out.float() - exact).abs().mean() < 0.2 * exact.std()


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 3, 3)])
@pytest.mark.parametrize("transformed", [False, True])
def test_batch_statistics_norm_against_torch_in_value_and_two_derivatives(shape, transformed):
    """All three of the image, the weight (one is zero) and the bias, through both of its ways."""
    generator = torch.Generator().manual_seed(1)
    x, weight, bias, *directions = (
        torch.randn(s, dtype=torch.float64, generator=generator) for s in (shape, 4, 4) * 2
    )
    weight[2] = 0
    norm = BatchStatsNorm(4).double()

    def ours(x, weight, bias):
        return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x,))

    def torchs(x, weight, bias):
        return F.batch_norm(x, None, None, weight, bias, training=True)

    def derivatives(function):
        def cubed(*at):
            return (function(*at) ** 3).sum()

        def along(*at):
            first = torch.func.grad(cubed, argnums=(0, 1, 2))(*at)
            return sum((g * d).sum() for g, d in zip(first, directions, strict=True))

        return torch.func.grad(along, argnums=(0, 1, 2))(x, weight, bias)

    def plain_derivatives(function):
        at = [v.clone().requires_grad_() for v in (x, weight, bias)]
        first = torch.autograd.grad((function(*at) ** 3).sum(), at, create_graph=True)
        return torch.autograd.grad(first, at, directions)

    second = (derivatives if transformed else plain_derivatives)(ours)
    torch.testing.assert_close(ours(x, weight, bias), torchs(x, weight, bias))
    for mine, theirs in zip(second, plain_derivatives(torchs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)


def test_dropblock_drops_squares_at_about_its_rate_and_rests_in_evaluation():
    torch.manual_seed(0)
    drop, x = DropBlock(0.2, 3), torch.ones(64, 8, 12, 12)
    out = drop(x)
    assert 0.12 < (out == 0).float().mean() < 0.24  # overlaps make it a little less than 0.2
    assert out.mean().item() == pytest.approx(1, abs=1e-4)
    smeared = F.max_pool2d((out[:1, :1] == 0).float(), 3, 1)  # every hole lies in a 3x3 hole
    holes = -F.max_pool2d(-(out[:1, :1] == 0).float(), 3, 1)
    assert holes.sum() > 0
    assert smeared.sum() > holes.sum()
    assert torch.equal(drop.eval()(x), x)


def test_resnet12_has_the_parameters_of_metaoptnets():
    """Counted by hand: blocks of 3x3, 3x3, 3x3 and 1x1 convolutions without bias, with norms."""
    widths, channels, expected = (64, 160, 320, 640), 3, 0
    for width in widths:
        expected += 9 * channels * width + 2 * 9 * width**2 + channels * width + 4 * 2 * width
        channels = width
    net = ResNet12(3, widths, "batch", 0.1, 2)
    assert sum(p.numel() for p in net.parameters()) == expected == 12_424_320


def test_torchvision_models_need_rgb_and_a_known_name():
    cfg = compose_config("train", ["backbone=torchvision"])
    with pytest.raises(UserError, match=r"take RGB, the data has 1 channel"):
        config.build_learner(cfg, (1, 28, 28))
    cfg.backbone.name = "resnet19"
    with pytest.raises(
        UserError, match=r"backbone\.name: no model 'resnet19'; allowed are .*resnet18"
    ):
        config.build_learner(cfg, (3, 32, 32))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The default weight init")  # says torchvision
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet18", 32), ("mobilenet_v3_small", 32), ("squeezenet1_1", 32), ("densenet121", 32),
        ("efficientnet_b0", 32), ("shufflenet_v2_x0_5", 32), ("vgg11", 32), ("googlenet", 64), ("inception_v3", 96),
        ("alexnet", 64), ("convnext_tiny", 32), ("swin_t", 64), ("vit_b_16", 224),
    ],
)  # fmt: skip
def test_torchvision_classifiers_embed(name, size):
    cfg = compose_config("train", ["backbone=torchvision", f"backbone.name={name}"])
    backbone = config.build_learner(cfg, (3, size, size)).eval().backbone
    for mode in (True, False):
        with torch.no_grad():
            out = backbone.train(mode)(torch.rand(2, 3, size, size))
        assert out.shape == (2, backbone.out_dim)


def test_one_value_a_channel_is_its_own_mean():
    """A single photo in a network without spatial extent, which torch's batch norm refuses."""
    norm = BatchStatsNorm(4)
    norm.fused = True
    assert torch.equal(norm(torch.rand(1, 4)), torch.zeros(1, 4))


@pytest.mark.parametrize("channels", [8, 12, 64])
def test_a_group_is_never_one_value(channels):
    out = make_norm("group", channels, dims=0)(torch.randn(5, channels))
    assert out.std(0).min() > 0.1
