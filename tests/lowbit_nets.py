"""The net of the low-bit tests, and short trainings."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxq
from fxq.trainable import TrainableModel

X = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Conv-BN-ReLU blocks, a residual sum, grouped and depthwise convs, a max pool, a transposed conv, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn_a = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b, self.bn_b = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8)
        self.c, self.bn_c = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.up, self.bn_up = nn.ConvTranspose2d(8, 8, 2, 2), nn.BatchNorm2d(8)
        self.d, self.bn_d, self.fc = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn_a(self.a(x)))
        y = F.max_pool2d(F.relu(self.bn_b(self.b(x))), 3, 1, 1)
        x = F.relu(x + self.bn_c(self.c(y)))
        x = F.relu(self.bn_up(self.up(x)))
        return self.fc(F.relu(self.bn_d(self.d(x.mean((2, 3))))))  # type: ignore[no-any-return]


def trained(model: nn.Module, x: Tensor, seed: int = 0) -> nn.Module:
    """Batch norms with statistics of data and gammas of both signs."""
    with torch.no_grad():
        for _ in range(3):
            model.train()(x + 0.1)
        g = torch.Generator().manual_seed(seed)
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.weight.copy_(torch.rand(m.weight.shape, generator=g) * 3 - 1.5)
                m.bias.copy_(torch.rand(m.bias.shape, generator=g) - 0.5)
    return model.eval()


def net() -> nn.Module:
    torch.manual_seed(0)
    return trained(Net(), X)


def qat(scheme: Any, model: nn.Module | None = None, x: Tensor = X, **options: Any) -> TrainableModel:
    made = fxq.compile(net() if model is None else model, scheme, mode="qat", calibration=x, progress=False, **options)
    assert isinstance(made, TrainableModel)
    return made


def steps(q: nn.Module, count: int, lr: float = 1e-2, seed: int = 1, x: Tensor = X) -> list[float]:
    g, losses = torch.Generator().manual_seed(seed), []
    opt = torch.optim.SGD(q.parameters(), lr=lr)
    for _ in range(count):
        opt.zero_grad()
        out = q(torch.randn(x.shape, generator=g))
        loss = F.cross_entropy(out, torch.randint(0, out.shape[1], (len(out),), generator=g))
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    return losses
