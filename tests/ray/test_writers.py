import pickle

import pytest

from per_td import NStepWriter
from tests.support.n_steps import collected, seeded, steps


@pytest.mark.parametrize("prioritized", [False, True])
def test_n_steps_go_to_shards_by_a_writer_of_ray(sharded, prioritized):
    buffer = sharded(num_shards=1, capacity_per_shard=200, batch_size=8)
    trajectories = steps(3, 20, generator=seeded(0))
    writer = NStepWriter(pickle.loads(pickle.dumps(buffer.writer())), 3, 0.9, 3)
    given = {"priority": [1.0, 2.0, 3.0]} if prioritized else {}
    for td in trajectories.unbind(1):
        writer.add(td, **given)
    writer.flush()
    assert len(buffer) == 60
    batch, expected = buffer.sample(500), collected(trajectories, 3, 0.9)
    rows = expected[batch["observation"][:, 0].long()]
    for key in ("observation", "discount", "steps", ("next", "reward"), ("next", "observation")):
        assert (batch[key] == rows[key]).all(), key
