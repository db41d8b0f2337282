"""The table by token id: it sees the newest token and nothing else, and learns rows that it has seen."""

import pytest
import torch

from buddy.compare import fit
from buddy.engine.model import RoutedLM, geometry_of
from buddy.run_files import load_router
from routers.token_table import TokenTable
from tests.tiny import tiny_backbone

IDS = torch.randint(3, 259, (4, 24), generator=torch.Generator().manual_seed(0))


def routed(spread: float = 1.0) -> RoutedLM:
    backbone = tiny_backbone()
    router = TokenTable(geometry_of(backbone), prior="none")
    torch.manual_seed(0)
    torch.nn.init.normal_(router.table.weight, std=spread)
    return RoutedLM(backbone, router, sink_tokens=0)


def test_the_plan_of_a_token_depends_on_its_id_alone():
    model, executed = routed(), torch.tensor([4, 4, 4, 4])
    runs = model(IDS, executed=executed).runs
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    assert torch.equal(model(IDS[:, order], executed=executed).runs, runs[:, order])
    assert len({tuple(plan) for plan in runs.flatten(0, 1).tolist()}) > 3


@pytest.mark.slow
def test_ids_that_training_does_not_see_keep_the_shared_scores(small, tmp_path):
    fit(small(tmp_path, "router=routers.token_table:TokenTable", "router.options={rows: 300}"), "small")
    (folder,) = (path.parent for path in tmp_path.rglob("router.safetensors"))
    table = load_router(folder)["table.weight"]
    assert table[:259].any()
    assert not table[259:].any()  # the model has 259 tokens
