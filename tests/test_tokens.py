"""Which tokens there are, and which of them end an answer."""

import pytest
import torch
from conftest import CHAT_TEMPLATE, VOCAB, make_model, make_tokenizer
from peft import LoraConfig, get_peft_model
from tokenizers.processors import TemplateProcessing

from camopd.prompts import PromptReader
from camopd.tokens import check_known, embedding_size, ends_of, head_size, need_end, turn_end, unended_turn


def with_turns(end: str, template: str | None = None):
    """A tokenizer whose template ends a turn with `end`; a sequence ends with "</s>"."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end_of_turn>", "<|end|>"]})
    tokenizer.chat_template = template or CHAT_TEMPLATE.replace("'.' }}{% endfor %}", f"'{end}\\n' }}}}{{% endfor %}}")
    return tokenizer


@pytest.mark.parametrize("end", ["<end_of_turn>", "<|end|>", "</s>", "\\n</s>"])
def test_end_of_a_turn_is_that_of_the_template(end):
    tokenizer = with_turns(end)
    expected = tokenizer.convert_tokens_to_ids(end.strip("\\n"))
    assert turn_end(tokenizer) == expected
    assert ends_of(tokenizer) == list(dict.fromkeys([expected, 2]))
    assert ends_of(tokenizer, 7) == list(dict.fromkeys([expected, 2, 7]))
    assert ends_of(tokenizer, [7, 2]) == list(dict.fromkeys([expected, 2, 7]))


def test_templates_without_an_end_of_turn_have_none():
    plain = make_tokenizer()
    assert turn_end(plain) is None  # its turns end with a full stop
    assert ends_of(plain) == [2]
    refusing = with_turns("", "{{ raise_exception('needs a system prompt') }}")
    forgetful = with_turns("", "{{ messages[0]['content'] }}")
    plain.chat_template = None
    for tokenizer in (plain, refusing, forgetful):
        assert turn_end(tokenizer) is None


def test_end_of_turn_that_ends_no_completion_is_a_warning_with_its_id():
    tokenizer = with_turns("<end_of_turn>")
    end = len(VOCAB)
    assert unended_turn(tokenizer, [2, end]) is None
    assert unended_turn(make_tokenizer(), [2]) is None
    found = unended_turn(tokenizer, [2])
    assert "'<end_of_turn>'" in found and f"add {end} to it" in found and "generation_config.json" in found


def test_tokenizer_without_an_end_is_refused_with_the_way_out():
    tokenizer = make_tokenizer()
    need_end(tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"has no end of sequence.*tokenizer.eos_token = "):
        need_end(tokenizer)


def test_head_may_have_more_rows_than_there_are_tokens():
    model = make_model(0, vocab_size=64)
    assert head_size(model) == embedding_size(model) == 64
    for settings in ({"modules_to_save": ["lm_head"]}, {"trainable_token_indices": {"lm_head": [3]}}):
        student = get_peft_model(make_model(0, vocab_size=64), LoraConfig(target_modules=["q_proj"], **settings))
        assert head_size(student) == embedding_size(student) == 64
    model.lm_head = torch.nn.Linear(32, 70)
    assert (head_size(model), embedding_size(model)) == (70, 64)


def test_prompt_with_a_token_that_the_student_cannot_read_is_refused_with_it():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<image>"])
    for ids in ([5, 42], []):
        check_known(ids, tokenizer, len(VOCAB))
    with pytest.raises(
        ValueError, match=r"'<image>' \(id 43\), and the student knows 43 tokens.*resize_token_embeddings"
    ):
        check_known([4, 43, 5], tokenizer, len(VOCAB))


@pytest.mark.parametrize("split", [False, True])
def test_text_prompt_that_the_tokenizer_ends_is_refused(split):
    """As one that a fine-tuning has saved with `add_eos_token`: an answer would begin behind a text that has ended."""
    tokenizer = make_tokenizer()
    reader = PromptReader(tokenizer, tokenizer, len(VOCAB), None, None, None, split)
    asked = [{"prompt": "a </s>", "row": "row 3"}]  # with a special token, which `split` encodes as text
    added = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=added)
    (ids,) = reader.ids(asked)
    assert ids[0] == tokenizer.bos_token_id and (ids[-1] == tokenizer.eos_token_id) != split
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=added)
    tokenizer.eos_token = "<pad>"  # a fine-tuning often gives the model another end
    with pytest.raises(ValueError, match=r"row 3 .*puts '</s>' behind every text.*as messages.*post_processor"):
        reader.ids(asked)


def test_text_prompt_with_two_begins_of_sequence_is_refused():
    """As apply_chat_template has written it, before the tokenizer puts its own in front."""
    tokenizer = make_tokenizer()
    added = [("<s>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=added)
    reader = PromptReader(tokenizer, tokenizer, len(VOCAB), None, None, None, False)
    (ids,) = reader.ids([{"prompt": "a <s>", "row": "row 4"}])
    assert ids.count(tokenizer.bos_token_id) == 2 and ids[0] == tokenizer.bos_token_id
    with pytest.raises(
        ValueError, match=r"row 5 .*begins with '<s>'.* another one before it.*Take it out of the text"
    ):
        reader.ids([{"prompt": "<s>a", "row": "row 5"}])
    as_text = PromptReader(tokenizer, tokenizer, len(VOCAB), None, None, None, True)
    assert as_text.ids([{"prompt": "<s>a", "row": "row 6"}])[0].count(tokenizer.bos_token_id) == 1
