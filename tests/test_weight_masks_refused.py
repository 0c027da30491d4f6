"""What sparsify, its masks and its schedule refuse: each with a way out, and nothing changed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fxq.errors import FxqError
from fxq.sparsity import WeightMasks, cubic_ratio, masks_of, sparsify
from tests.test_weight_masks import Net


def _nan() -> nn.Module:
    net = Net()
    with torch.no_grad():
        net.b.weight[0, 0, 0, 0] = torch.nan
    return net


def _masked() -> nn.Module:
    net = Net()
    sparsify(net, 0.5)
    return net


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "ratio 1": (Net, {"ratio": 1.0}, "ratio 1.0 is not in [0, 1)"),
    "negative": (Net, {"ratio": -0.1}, "ratio -0.1 is not in [0, 1)"),
    "nan ratio": (Net, {"ratio": float("nan")}, "ratio nan is not"),
    "text": (Net, {"ratio": "0.5"}, "ratio '0.5' is not"),
    "bool": (Net, {"ratio": True}, "ratio True is not"),
    "neither": (Net, {}, "a ratio or a pattern"),
    "both": (Net, {"ratio": 0.5, "pattern": "2:4"}, "a ratio or a pattern"),
    "4:2": (Net, {"pattern": "4:2"}, "unknown pattern '4:2'"),
    "4:4": (Net, {"pattern": "4:4"}, "unknown pattern '4:4'"),
    "0:4": (Net, {"pattern": "0:4"}, "unknown pattern '0:4'"),
    "x": (Net, {"pattern": "x"}, "unknown pattern 'x'. Give 'N:M'"),
    "scope": (Net, {"ratio": 0.5, "scope": "globl"}, "unknown scope 'globl'. did you mean 'global'?"),
    "name": (Net, {"ratio": 0.5, "keep": "upp"}, "keep='upp' matches no layer. did you mean 'up'?"),
    "type": (Net, {"ratio": 0.5, "keep": [nn.Conv1d]}, "keep='Conv1d' matches no layer"),
    "number": (Net, {"ratio": 0.5, "keep": 4}, "keep='4' matches no layer. there are 4 conv and linear layers"),
    "all kept": (Net, {"ratio": 0.5, "keep": "*"}, "no weight can be masked (a.weight: kept on request (*)"),
    "no weights": (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), {"ratio": 0.5}, "the model has no conv or linear layer"),
    "no fit": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3)), {"pattern": "2:4"}, "no weight can be masked (0.weight: its 3 input channels"),
    "nan": (_nan, {"ratio": 0.5}, "b.weight: the weight holds NaN"),
    "lazy": (lambda: nn.LazyLinear(4), {"ratio": 0.5}, "weight: the weight has no data yet"),
    "meta": (lambda: nn.Linear(4, 4, device="meta"), {"ratio": 0.5}, "weight: the weight has no data yet"),
    "twice": (_masked, {"ratio": 0.5}, "a: the layer has a mask. Call update()"),
    "wrapped": (lambda: nn.DataParallel(Net()), {"ratio": 0.5}, "DataParallel: the model is wrapped"),
    "too few": (lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), {"ratio": 0.9}, "ratio 0.9 leaves 1 weights for 2 layers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    make, options, said = REFUSED[case]
    net = make()
    before = {k: v.clone() for k, v in net.state_dict().items() if case not in ("lazy", "meta")}
    with pytest.raises(FxqError) as e:
        sparsify(net, **options)
    assert said in str(e.value) and e.value.way_out
    assert set(before) <= set(net.state_dict()), "nothing was changed"


def _gone(call: Callable[[WeightMasks], Any]) -> None:
    masks = sparsify(Net(), 0.5)
    masks.remove()
    call(masks)


LATE: dict[str, tuple[Callable[[], Any], str]] = {
    "less": (lambda: sparsify(Net(), 0.5).update(0.4), "ratio 0.4 is below the share that is cut already. Give at least 0.5"),
    "range": (lambda: sparsify(Net(), 0.5).update(1.5), "ratio 1.5 is not in [0, 1)"),
    "pattern": (lambda: sparsify(nn.Linear(8, 8), pattern="2:4").update(0.9), "the pattern 2:4 says how much is cut"),
    "gone": (lambda: _gone(lambda masks: masks.update(0.9)), "a.weight: its mask was removed"),
    "gone twice": (lambda: _gone(WeightMasks.remove), "a.weight: its mask was removed"),
    "density": (lambda: _gone(WeightMasks.density), "a.weight: its mask was removed"),
    "table": (lambda: _gone(str), "a.weight: its mask was removed"),
    "none": (lambda: masks_of(Net()), "Net: the model has no masks"),
    "falls": (lambda: cubic_ratio(1, begin=0, end=9, final=0.2, initial=0.5), "from 0.5 at step 0 to 0.2 at step 9 nothing grows"),
    "backwards": (lambda: cubic_ratio(1, begin=9, end=9, final=0.2), "nothing grows"),
    "final": (lambda: cubic_ratio(1, begin=0, end=9, final=1.0), "ratio 1.0 is not in [0, 1)"),
}


@pytest.mark.parametrize("case", LATE)
def test_refused_later(case: str) -> None:
    call, said = LATE[case]
    with pytest.raises(FxqError) as e:
        call()
    assert said in str(e.value) and e.value.way_out
