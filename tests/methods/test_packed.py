"""Packed rows (position_ids that restart, no mask): each sequence as it is alone, or one sentence.

pytest tests/methods/test_packed.py
"""

import pytest
import torch
from tiny import ADAPTERS, METHODS, VOCAB, attached

from moabench.methods.spec import ConfigError
from moabench.methods.tuner.model import refuse_packed

LENGTHS = (5, 1, 7)
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]


@pytest.mark.parametrize("name", ADAPTERS)
@torch.no_grad()
def test_a_packed_row_is_its_sequences_or_refused(name):
    model = attached(name)
    ids = torch.randint(3, VOCAB, POSITIONS.shape, generator=torch.Generator().manual_seed(0))
    routers = [mixture.router for mixture in METHODS[name].mixtures]
    if any(router.reads_prompt or router.granularity == "sequence" for router in routers):
        with pytest.raises(ConfigError, match="position_ids: they restart within a row"):
            model(input_ids=ids, position_ids=POSITIONS, use_cache=False)
        return
    packed = model(input_ids=ids, position_ids=POSITIONS, use_cache=False).logits
    alone = [model(input_ids=part, use_cache=False).logits for part in ids.split(LENGTHS, 1)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), atol=2e-5, rtol=1e-5)


def test_positions_that_count_on_are_one_sequence():
    for positions in (None, torch.arange(4)[None] + 7, torch.tensor([[3]]), torch.zeros(3, 1, 4)):
        refuse_packed(positions)
