"""The form ``unpack``: packed projections become layers of their own; the function stays, bit for bit but for the order of sums."""

import pytest
import torch
import torchvision
from torch import Tensor, nn

import fxq
from fxq import modules as m
from fxq.forms_unpack import unpack
from fxq.graph import kind, walk
from tests.helpers import canonical, context

X = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0))


class Split(nn.Module):
    def __init__(self, sizes: tuple[int, ...], bias: bool = True, dim: int = 2) -> None:
        super().__init__()
        self.qkv, self.split, self.cat = nn.Linear(24, sum(sizes), bias=bias), m.Split(sizes, dim), m.Cat(2)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.split(self.qkv(x))
        return self.cat(parts[1], parts[0])  # type: ignore[no-any-return]


class Heads(nn.Module):
    """``[B, L, 3 * H * D] -> [B, L, 3, H, D] -> [3, B, H, L, D] -> q, k, v``."""

    def __init__(self, permute: bool = True, blocks: tuple[tuple[int, int | None], ...] = ((0, 1), (1, 2), (2, None))) -> None:
        super().__init__()
        self.qkv, self.cut = nn.Linear(24, 36), m.Reshape((None, None, 3, 2, 6))
        self.turn = m.Permute((2, 0, 3, 1, 4)) if permute else None
        self.parts = nn.ModuleList(m.Slice([(0 if permute else 2, b, e, 1)]) for b, e in blocks)
        self.cat = m.Cat(0 if permute else 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.cut(self.qkv(x))
        y = y if self.turn is None else self.turn(y)
        return self.cat(*[p(y) for p in self.parts])  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "widths"),
    [
        (Split((8, 16, 8)), [16, 8]), (Split((8, 16), bias=False), [16, 8]), (Heads(), [12, 12, 12]), (Heads(permute=False), [12, 12, 12]),
        (Heads(blocks=((0, 2), (2, 3))), [24, 12]), (Heads(blocks=((1, 3), (0, 1))), [24, 12]),
    ],
)  # fmt: skip
def test_one_layer_for_each_projection(model: nn.Module, widths: list[int]) -> None:
    gm = canonical(model, X)
    want = gm(X)
    assert unpack(gm, context(X, scheme="iao_w8a8_sym", target="sm86")) == 1
    fxq.graph.finish(gm)
    layers = [gm.get_submodule(str(n.target)) for n, _ in walk(gm, "linear")]
    assert sorted(layer.out_features for layer in layers) == sorted(widths)  # type: ignore[union-attr]
    assert torch.allclose(gm(X), want, atol=1e-6) and gm(X).shape == want.shape
    assert torch.equal(gm(X[:1]).isfinite(), torch.ones_like(gm(X[:1]), dtype=torch.bool)), "another batch size"


@pytest.mark.parametrize(
    "model",
    [
        Split((3, 2), dim=1),  # along the sequence, not the features
        Heads(blocks=((0, 1),)),  # a single reader: nothing is packed
    ],
)
def test_what_is_not_packed_stays(model: nn.Module) -> None:
    if isinstance(model, Split):
        model.cat = m.Cat(1)
    gm = canonical(model, X)
    assert unpack(gm, context(X, scheme="iao_w8a8_sym", target="sm86")) == 0


def test_a_second_reader_of_the_layer_keeps_it_whole() -> None:
    class Both(Split):
        def forward(self, x: Tensor) -> Tensor:
            y = self.qkv(x)
            parts = self.split(y)
            return self.cat(parts[1], y)  # type: ignore[no-any-return]

    gm = canonical(Both((8, 16)), X)
    assert unpack(gm, context(X, scheme="iao_w8a8_sym", target="sm86")) == 0


def test_attention_layers_of_torchvision_are_unpacked() -> None:
    torch.manual_seed(0)
    vit = torchvision.models.vit_b_16(weights=None, image_size=32, num_classes=16).eval()
    vit.encoder.layers = vit.encoder.layers[:1]
    nn.init.normal_(vit.heads.head.weight)  # torchvision starts it at zero
    swin = torchvision.models.SwinTransformer([4, 4], 48, [2], [3], [4, 4], num_classes=16).eval()
    for net in (vit, swin):
        x = torch.randn(2, 3, 32, 32)
        compiled = fxq.compile(net, "int8", calibration=x, target="sm86", progress=False)
        gm = compiled.graph_module
        packed = [str(n.target) for n, _ in walk(gm, "linear") if n.meta["shape"][-1] == 3 * n.all_input_nodes[0].meta["shape"][-1]]
        assert packed == [] and sum(kind(gm, n) == "linear" for n in gm.graph.nodes) >= 6
        with torch.no_grad():
            assert float((compiled(x) - net(x)).norm() / net(x).norm()) < 0.1
