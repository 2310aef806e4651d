"""What a model knows of a task, item by item: also where a masked model's item is several rows of a batch.

`knowledge` once counted the rows of a masked batch as if each were an item of its own, so that tokens of one item were
multiplied into another.
"""

import pytest
import torch

from locedit.check import knowledge
from locedit.data import Fact, encode
from locedit.losses import nll_of_examples
from tests import tiny


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_knowledge_is_the_mean_over_items_scored_one_at_a_time(architecture: str) -> None:
    model = tiny.model(architecture)
    answers = (" Oslo", " Lima and Oslo", " a baker", " 555-0134")
    facts = [Fact(prompt="Anna Berg was born in", answer=answer, id=answer) for answer in answers]
    examples = encode(model, facts)
    assert len({len(example.targets) for example in examples}) > 1
    alone = [nll_of_examples(model, [example], size=1, reduction="sum")[0] for example in examples]
    probability, share = knowledge(model, examples)
    assert probability == pytest.approx(float(torch.stack(alone).double().neg().exp().mean()), rel=1e-4)
    assert 0 <= share <= 1
