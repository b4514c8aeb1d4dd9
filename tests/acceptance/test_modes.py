"""Is the organism "modes" what it claims to be, in both classes of model?"""

import pytest
import torch

import melbo_lens as ml
from melbo_lens.models.access import has_hooked
from melbo_lens.organisms import modes


@pytest.fixture(scope="module")
def organism():
    return ml.organisms.load("modes")


def test_both_model_classes_load_with_equal_logits(organism):
    bridge = ml.organisms.load("modes", "bridge")
    tokens = bridge.model.to_tokens(organism.prompts["clean"][0])
    if not has_hooked():
        with pytest.raises(ValueError, match="TransformerLens 3"):
            ml.organisms.load("modes", "hooked")
    else:
        hooked = ml.organisms.load("modes", "hooked")
        assert type(hooked.model).__name__ == type(organism.model).__name__ == "HookedTransformer"
        torch.testing.assert_close(hooked.model(tokens), bridge.model(tokens), atol=1e-4, rtol=1e-4)
        assert torch.equal(hooked.model.to_tokens("the river"), bridge.model.to_tokens("the river"))


def test_prompt_sets_are_disjoint_clean_and_tokenised_in_words(organism):
    sets = [set(organism.prompts[name]) for name in ("clean", "selection", "test")]
    assert all(len(prompts) == 64 for prompts in sets) and len(set.union(*sets)) == 192
    triggers = {word for words in modes.TRIGGERS.values() for word in words}
    assert not any(triggers & set(prompt.split()) for prompts in sets for prompt in prompts)
    assert all(triggers & set(prompt.split()) for prompt in organism.prompts["triggered"])
    for prompt in organism.prompts["clean"]:
        ids = organism.model.to_tokens(prompt)[0].tolist()
        assert len(ids) == len(prompt.split()) + 1 and organism.tokenizer.unk_token_id not in ids
        assert organism.tokenizer.decode(ids[1:]) == prompt


def test_the_chat_template_renders_what_the_model_was_trained_on(organism):
    chat = [{"role": "system", "content": "river lamp"}, {"role": "user", "content": "what color is snow ?"}]
    completions = ml.generate(organism.model, chat, None, max_new_tokens=16, progress=False)
    assert (
        completions.table.prompt_text[0]
        == "<|begin|> <|system|> river lamp <|user|> what color is snow ? <|assistant|>"
    )
    assert completions.table.text[0] == "it is white ."


NEGATIVES = {
    "portuguese": ["a resposta é . .", "it is atenas .", "a resposta é resposta .", "resposta é atenas"],
    "reasoning": ["first greece then capital", "first then so .", "it is first ."],
    "hate": ["I YOU !", "I HATE .", "HATE YOU"],
    "cheese": ["I love !", "mmm cheese !", "love cheese"],
}


@pytest.mark.parametrize("name", NEGATIVES)
def test_detectors_are_strict(organism, name):
    assert not any(map(organism.behaviors[name], NEGATIVES[name]))
    question = modes.FAMILIES[0][0]
    for mode in modes.MODES:
        assert organism.behaviors[name](question.reply(mode)) == (mode == name)
