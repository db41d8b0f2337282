"""What measured values are kept under."""

import pytest
import torch

from buddy.calibration.store import setting_of
from tests.calibration.small import WINDOWS, routed

BEFORE = setting_of(routed(), WINDOWS, 2)


def test_the_same_again():
    assert setting_of(routed(), WINDOWS.clone(), 2) == BEFORE


def differing(model=None, windows=WINDOWS, batch_size=2) -> set[str]:
    after = setting_of(model or routed(), windows, batch_size)
    return {name for name in BEFORE if after[name] != BEFORE[name]}


def test_what_changes_the_values_changes_the_setting(monkeypatch):
    assert differing(routed(seed=1)) == {"backbone", "weights"}
    assert differing(routed(sinks=2)) == {"sink_tokens"}
    assert differing(routed(context_layer=2)) == {"context_layer"}
    assert differing(windows=WINDOWS.flip(0)) == {"windows"}
    assert differing(windows=WINDOWS.view(10, 10)) == {"shape"}
    assert differing(batch_size=3) == {"batch_size"}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert differing() == {"threads"}


def test_weights_that_moved_a_little_are_other_weights():
    model = routed()
    with torch.no_grad():
        model.backbone.layers[3].mlp.down_proj.weight.mul_(1.001)  # no sign changes, so the fingerprint is the same
    assert differing(model) == {"weights"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_dtype(dtype):
    model = routed()
    model.backbone.model.to(dtype)
    assert differing(model) == {"dtype", "weights"}
