"""Small nets for pruning: one coupling of channels each, with the widths of the groups that a reader finds in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from fxq import schemes, targets
from fxq.passes.canonicalize import Canonicalize
from fxq.passes.propagate_shapes import PropagateShapes
from fxq.pipeline import PassContext, Pipeline
from fxq.snapshot import History
from fxq.trace import capture


def canonical(net: nn.Module, *inputs: Tensor) -> GraphModule:
    """The net as a canonical float64 graph with shapes, random norms and biases."""
    captured = capture(net.eval(), inputs)
    assert captured.gm is not None
    ctx = PassContext(schemes.get("float"), targets.get("onnxruntime"), inputs)
    Pipeline((Canonicalize(), PropagateShapes())).run(captured.gm, ctx, History())
    return captured.gm.double()


def randomised(net: nn.Module, seed: int = 0) -> nn.Module:
    """Nothing is left at zero or one, so that equal outputs mean something."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(0, 0.4, generator=g)
        for m in net.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.running_mean.normal_(0, 0.3, generator=g)
                m.running_var.uniform_(0.5, 1.5, generator=g)
    return net.eval()


class Residual(nn.Module):
    """A stem, one block around which its output is added, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.a, self.b = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = x + self.b(F.relu(self.a(x)))
        return self.head(x.mean((2, 3)))


class OptionA(nn.Module):
    """The shortcut pads channels with zeros on both sides and takes every second pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 1, 1)
        self.bn, self.head = nn.BatchNorm2d(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)) + self.bn(self.b(F.relu(self.a(x)))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Dense(nn.Module):
    """Concatenations, with a batch norm of its own in front of each reader."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(14, 4, 1)
        self.n1, self.n2, self.n3 = nn.BatchNorm2d(8), nn.BatchNorm2d(14), nn.BatchNorm2d(18)
        self.head = nn.Linear(18, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = torch.cat([x, self.b(F.relu(self.n1(x)))], 1)
        x = torch.cat([x, self.c(F.relu(self.n2(x)))], 1)
        return self.head(F.relu(self.n3(x)).mean((2, 3)))


class Gated(nn.Module):
    """Chunk into two halves that multiply (GLU), and a squeeze-excite gate."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(8, 10, 3)
        self.down, self.up, self.head = nn.Conv2d(10, 4, 1), nn.Conv2d(4, 10, 1), nn.Conv2d(10, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        p, q = self.a(x).chunk(2, 1)
        x = self.b(p * torch.sigmoid(q))
        return self.head(x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True))))))


class Shuffled(nn.Module):
    """Grouped convolutions with a channel shuffle between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 24, 1), nn.Conv2d(24, 48, 3, padding=1, groups=4), nn.Conv2d(48, 24, 1, groups=3)
        self.bn, self.head = nn.BatchNorm2d(48), nn.Conv2d(24, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.b(F.relu(self.a(x)))))
        n, c, h, w = x.shape
        x = x.view(n, 4, c // 4, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(F.relu(self.c(x)))


class Depthwise(nn.Module):
    """Depthwise convolutions, one with two outputs a channel, one transposed; PReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.up, self.act, self.head = nn.ConvTranspose2d(16, 16, 2, 2, groups=16), nn.PReLU(16), nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.up(self.b(F.relu(self.a(x))))))


class Upscaling(nn.Module):
    """Transposed convolutions, plain and grouped; pixel shuffle; concatenation with a skip (U-Net)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, 2, 1)
        self.up, self.grouped = nn.ConvTranspose2d(12, 8, 2, 2), nn.ConvTranspose2d(8, 16, 3, 1, 1, groups=2)
        self.sub, self.head = nn.Conv2d(24, 16, 1), nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.relu(self.a(x))
        x = F.relu(self.grouped(F.relu(self.up(F.relu(self.b(skip))))))
        return self.head(F.relu(F.pixel_shuffle(self.sub(torch.cat([x, skip], 1)), 2)))


class Norms(nn.Module):
    """Group, instance and layer norm over channels that are cut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 8, 3), nn.Conv2d(8, 10, 1)
        self.gn, self.inn, self.ln = nn.GroupNorm(3, 12), nn.InstanceNorm2d(8, affine=True), nn.LayerNorm(10)
        self.per, self.d, self.head = nn.GroupNorm(6, 6), nn.Linear(10, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(F.relu(self.inn(self.b(F.relu(self.gn(self.a(x)))))))
        x = self.d(F.gelu(self.ln(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)
        return self.head(F.relu(self.per(x)).mean((2, 3)))


class Flattened(nn.Module):
    """A convolution flattened into linear layers: blocks of H * W columns."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8 * 16, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.fc(F.relu(self.a(x)).flatten(1))))


class Packed(nn.Module):
    """Attention with one projection of queries, keys and values, as in Swin: (3, heads, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.qkv, self.out = nn.Linear(6, 16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.norm, self.up, self.down, self.head = nn.LayerNorm(16), nn.Linear(16, 20), nn.Linear(20, 16), nn.Linear(16, 5)
        self.bias = nn.Parameter(torch.zeros(1, 4, 7, 7))

    def forward(self, x: Tensor) -> Tensor:
        x = self.emb(x)
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, 4, c // 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = ((q @ k.transpose(-2, -1)) * 0.5 + self.bias).softmax(-1) @ v
        x = x + self.out(y.transpose(1, 2).reshape(b, n, c))
        return self.head((x + self.down(F.gelu(self.up(x)))).mean(1))


class Language(nn.Module):
    """Token and position embeddings, nn.MultiheadAttention, the output layer tied to the token embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(11, 16), nn.Parameter(torch.zeros(1, 7, 16))
        self.attention, self.norm = nn.MultiheadAttention(16, 4, batch_first=True), nn.LayerNorm(16)
        self.up, self.down, self.head = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.tokens(x) + self.places
        y = self.norm(y + self.attention(y, y, y, need_weights=False)[0])
        return self.head(y + self.down(F.silu(self.up(y))))


class Twice(nn.Module):
    """One convolution that runs twice: its outputs and its inputs are one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.again, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.again(F.relu(self.again(F.relu(self.stem(x)))))))


class Picked(nn.Module):
    """Every second channel, and the last four: slices of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 12, 1), nn.Conv2d(6, 8, 1), nn.Conv2d(4, 8, 1)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        return self.head(self.b(x[:, ::2]) + self.c(x[:, 8:]))


class Sequence(nn.Module):
    """Conv1d, BatchNorm1d, Conv3d-free audio front end with pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.b, self.head = nn.Conv1d(4, 10, 3), nn.BatchNorm1d(10), nn.Conv1d(10, 8, 3, bias=False), nn.Linear(8, 5)
        self.nb = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.max_pool1d(F.relu(self.nb(self.b(F.relu(self.bn(self.a(x)))))), 2).mean(2))


class Volume(nn.Module):
    """Conv3d with a batch norm in front (pre-activation)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.b, self.head = nn.Conv3d(2, 8, 3, padding=1), nn.BatchNorm3d(8), nn.Conv3d(8, 6, 1), nn.Conv3d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.hardswish(self.b(F.relu(self.bn(self.a(x))))))


@dataclass(frozen=True)
class Case:
    """A net, its input and the groups that must be found in it: (units, channels a unit) in the order of the graph."""

    net: Callable[[], nn.Module]
    shape: tuple[int, ...]
    groups: tuple[tuple[int, int], ...]
    tokens: int = 0

    def input(self, seed: int = 0) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        return torch.randint(0, self.tokens, self.shape, generator=g) if self.tokens else torch.randn(self.shape, generator=g)


CASES = {
    "residual": Case(Residual, (2, 3, 6, 6), ((8, 1), (12, 1))),
    "option-a": Case(OptionA, (2, 3, 8, 8), ((8, 1), (16, 1), (8, 1))),
    "dense": Case(Dense, (2, 3, 6, 6), ((8, 1), (6, 1), (4, 1))),
    "gated": Case(Gated, (2, 3, 8, 8), ((8, 2), (10, 1), (4, 1))),
    "shuffled": Case(Shuffled, (2, 3, 5, 5), ((24, 1), (48, 1), (24, 1))),
    "depthwise": Case(Depthwise, (2, 3, 6, 6), ((8, 1),)),
    "upscaling": Case(Upscaling, (2, 3, 8, 8), ((8, 1), (12, 1), (8, 1), (16, 1), (4, 4))),
    "norms": Case(Norms, (2, 3, 8, 8), ((12, 1), (8, 1), (10, 1), (6, 1))),
    "flattened": Case(Flattened, (2, 3, 6, 6), ((8, 1), (12, 1))),
    "packed": Case(Packed, (2, 7, 6), ((16, 1), (4, 12), (20, 1))),
    "language": Case(Language, (2, 7), ((16, 1), (4, 12), (24, 1)), 11),
    "twice": Case(Twice, (2, 3, 6, 6), ((8, 1),)),
    "picked": Case(Picked, (2, 3, 4, 4), ((12, 1), (8, 1))),
    "sequence": Case(Sequence, (2, 4, 16), ((10, 1), (8, 1))),
    "volume": Case(Volume, (2, 2, 4, 4, 4), ((8, 1), (6, 1))),
}
