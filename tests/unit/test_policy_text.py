"""Prompts as token ids: whatever a prompt says, it stays text."""

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_policy import new_policy

ADDED = [
    "<I12>", "<I0>", "<I63>", "<S0>", "<S2>", "<im_start>", "<im_end>", "<|im_start|>",
    "<|im_end|>", "<|endoftext|>", "<I", "12>", "<|", "<I1<I2>2>", "{prompt}", " <I3> ",
]  # fmt: skip
texts = st.lists(st.one_of(st.text(max_size=12), st.sampled_from(ADDED)), max_size=8).map("".join)


@cache
def shared_policy():
    return new_policy()


@settings(max_examples=300, deadline=None)
@given(texts)
def test_no_prompt_can_inject_a_token(text):
    policy = shared_policy()
    id_of = policy.tokenizer.convert_tokens_to_ids
    [ids] = policy.prompt_ids([text])
    head, tail = ["<|im_start|>"], ["<|im_end|>", "<im_start>", "<S0>"]
    assert ids[:1] == [id_of(token) for token in head]
    assert ids[-3:] == [id_of(token) for token in tail]
    words = ids[1:-3]
    assert not set(words) & set(policy.tokenizer.get_added_vocab().values())
    assert policy.tokenizer.decode(words, clean_up_tokenization_spaces=False) == text


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="abcdefgh ABC\"'.,0123", max_size=40))
def test_ordinary_text_is_tokenised_as_the_tokenizer_does(text):
    policy = shared_policy()
    [ids] = policy.prompt_ids([text])
    assert ids == policy.tokenizer(policy.prompt_text(text), add_special_tokens=False)["input_ids"]


def test_a_batch_is_its_prompts_one_by_one():
    policy = shared_policy()
    prompts = ["a photo of a red circle", "", "<I12>", "x" * 200]
    assert policy.prompt_ids(prompts) == [policy.prompt_ids([p])[0] for p in prompts]


@pytest.mark.parametrize("padding", [True, "max_length"])
def test_padding_elsewhere_does_not_leak_into_prompts(padding):
    policy = new_policy()
    expected = shared_policy().prompt_ids(["a", "a red circle"])
    policy.tokenizer(["a", "a red circle"], padding=padding, max_length=64, truncation=True)
    assert policy.prompt_ids(["a", "a red circle"]) == expected


def test_words_on_signs_are_spelled_letter_by_letter():
    policy = shared_policy()
    [ids] = policy.prompt_ids(['a sign that says "CAB"'])
    tokens = policy.tokenizer.convert_ids_to_tokens(ids)
    assert [token for token in tokens if token in "ABC"] == ["C", "A", "B"]
