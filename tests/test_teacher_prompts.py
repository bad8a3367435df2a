"""A teacher may see another prompt than the student, whose tokens stay as they are.

What a run makes of it over several processes is in steps.py, for test_trainer.py; a real vLLM server is in test_vllm.py.
"""

import copy
import re
import shutil
from concurrent.futures import Future

import pytest
import torch
from conftest import LOGP, make_model, make_prompts, make_tokenizer
from datasets import Dataset
from fake_rollouts import FakeRollouts
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from trainers import lines, make_trainer
from transformers import PreTrainedTokenizerFast

from camopd.errors import ResumeError, TeacherError
from camopd.prompts import PromptReader, PromptStream
from camopd.step import StepCallback
from camopd.teacher_prompts import TeacherPrompts, contexts_of, fill, read_templates
from camopd.teachers.local import LocalTeacher


SCORES = 1e-5  # nats, of log-probs down to -10 or so: ten of the smallest differences that float32 has there, 2**-20
HINT = "you know it is 7. {prompt}"
ONE = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "yes"}]
SYSTEM = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "now {prompt} please"}]
TURNED = {"schedule": "general:1,domain:1", "teacher_prompt": {"domain": HINT}}


def user(text):
    return [{"role": "user", "content": text}]


def logps(model, prompt, completion):
    """Log-probs of a completion, by a plain forward."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(dim=-1)[range(len(completion)), completion]


class Remote(LocalTeacher):
    """Is asked as a teacher outside the process is."""

    def submit(self, token_ids, prompt_lens, top_k=0):
        self.asked = [*getattr(self, "asked", ()), len(token_ids)]
        future = Future()
        future.set_result(self.score(token_ids, prompt_lens, top_k))
        return future


class Watch(StepCallback):
    """Keeps the samples of each step as they are scored, and the student that they are of."""

    def __init__(self):
        self.steps = []

    def on_rolled_out(self, samples):
        self.student = copy.deepcopy(self.trainer.accelerator.unwrap_model(self.trainer.model)).eval()

    def on_step_ready(self, step):
        rows = {row["position"]: row for row in self.trainer.train_dataset.rows_of(step.number)}
        self.steps.append((step, self.student, [(rows[sample.position], sample) for sample in step.samples]))


def watched(folder, tokenizer, resume=None, **kwargs):
    watch = Watch()
    watch.trainer = trainer = make_trainer(folder, tokenizer, callbacks=[watch], **kwargs)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, watch.steps


def check_steps(steps, tokenizer, teacher_of, template=HINT):
    """Every log-prob of the teachers and the student is that of a plain forward with the prompt that each sees."""
    gaps = []
    for _, student, samples in steps:
        for row, sample in samples:
            own, completion = tokenizer(row["prompt"])["input_ids"], sample.token_ids[sample.prompt_len :]
            assert sample.token_ids[: sample.prompt_len] == own and completion
            seen = own
            if row["branch"] == "domain":
                seen = tokenizer(template.replace("{prompt}", row["prompt"]))["input_ids"]
            expected = logps(teacher_of(row["branch"], student), seen, completion)
            torch.testing.assert_close(sample.teacher_logps, expected, rtol=0, atol=SCORES)
            torch.testing.assert_close(sample.student_logps, logps(student, own, completion), rtol=0, atol=LOGP)
            gaps.append((row["branch"], float(sample.gaps.abs().max())))
    return gaps


# ----------------------------------------------------------------------------------------------------------- in a run


@pytest.mark.parametrize(
    "kind", ["model", "server", "streamed", "self", "self, LoRA", "self, a step ahead", "adapter_off"]
)
def test_teacher_of_one_branch_sees_another_prompt(kind, tmp_path, tokenizer, start_server, lora_student):
    """A branch with and one without take turns."""
    teacher, settings = make_model(1), {"optim": "sgd", **TURNED}
    spec = make_model(1) if kind == "model" else kind.partition(",")[0]
    if kind == "server":
        spec = start_server().url
    if kind == "streamed":
        spec, rollouts = Remote(make_model(1), "d", "cpu", 2), FakeRollouts(make_model(9), tokenizer)
        settings["rollout_servers"] = [rollouts.url]
    if kind == "self, a step ahead":
        rollouts = FakeRollouts(make_model(9), tokenizer)
        settings |= {"rollout_servers": [rollouts.url], "rollout_lag": 1}
    student = lora_student if kind in ("adapter_off", "self, LoRA") else make_model(1)
    if kind == "adapter_off":
        teacher = copy.deepcopy(lora_student).unload().eval()
    trainer, steps = watched(
        tmp_path, tokenizer, model=student, teachers={"general": make_model(2), "domain": spec}, **settings
    )
    if "rollout_servers" in settings:
        trainer.run.sampler.close()
        rollouts.close()
    if kind == "streamed":
        assert spec.asked == [1] * 8  # each as it was written
    if kind == "server":
        trainer.teachers["domain"].close()
    general = make_model(2)
    gaps = check_steps(
        steps, tokenizer,
        lambda branch, now: general if branch == "general" else now if spec == "self" else teacher,
    )  # fmt: skip
    assert [branch for branch, _ in gaps] == ["general"] * 4 + ["domain"] * 4 + ["general"] * 4 + ["domain"] * 4
    assert min(gap for _, gap in gaps) > 0.01  # of equal weights, too
    assert [step.label for step, _, _ in steps] == ["general", "domain"] * 2


def test_rows_may_bring_the_prompts_of_their_teachers(tmp_path, tokenizer):
    """As messages, and for held-out prompts as well."""

    def rows(branch):
        return Dataset.from_list(
            [
                {"prompt": user(f"{branch} {place}"), "teacher_prompt": user(f"is it {branch} {place}?")}
                for place in range(5)
            ]
        )

    _, steps = watched(
        tmp_path, tokenizer, teachers={"general": "self", "domain": make_model(3)}, max_steps=2,
        schedule="general:1,domain:1", train_dataset={branch: rows(branch) for branch in ("general", "domain")},
        eval_dataset={"domain": rows("domain")}, eval_strategy="steps", eval_steps=1, eval_on_start=True,
    )  # fmt: skip
    for _, student, samples in steps:
        for row, sample in samples:
            text = row["prompt"][0]["content"]
            assert sample.token_ids[: sample.prompt_len] == tokenizer(f"u {text}.a ")["input_ids"]
            assert sample.teacher_prompt == tokenizer(f"u is it {text}?.a ")["input_ids"]
            teacher = student if row["branch"] == "general" else make_model(3)
            expected = logps(teacher, sample.teacher_prompt, sample.token_ids[sample.prompt_len :])
            torch.testing.assert_close(sample.teacher_logps, expected, rtol=0, atol=LOGP)


def test_evaluation_measures_the_gap_to_the_teacher_with_its_prompt(tmp_path, tokenizer):
    trainer = make_trainer(
        tmp_path, tokenizer, **TURNED, eval_dataset={"domain": make_prompts("domain", 3)},
        teachers={"general": make_model(2), "domain": make_model(3)},
    )  # fmt: skip
    scored, score = [], trainer.scorer.score
    trainer.scorer.score = lambda samples, *more: (score(samples, *more), scored.extend(samples))[0]
    found = trainer.evaluate()
    assert len(scored) == found["eval_domain_prompts"] == 3
    kls = []
    for row, sample in zip(make_prompts("domain", 3), sorted(scored, key=lambda sample: sample.position), strict=True):
        assert sample.teacher_prompt == tokenizer(HINT.replace("{prompt}", row["prompt"]))["input_ids"]
        own, completion = tokenizer(row["prompt"])["input_ids"], sample.token_ids[sample.prompt_len :]
        seen = tokenizer(HINT.replace("{prompt}", row["prompt"]))["input_ids"]
        kls.append(float((logps(make_model(1), own, completion) - logps(make_model(3), seen, completion)).mean()))
    assert found["eval_domain_kl"] == pytest.approx(sum(kls) / 3, abs=LOGP)


def test_resume_is_exact_and_refuses_another_template(tmp_path, tokenizer):
    kwargs = {**TURNED, "teachers": {"general": make_model(2), "domain": "self"}, "save_strategy": "steps"}
    whole, _ = watched(tmp_path / "one", tokenizer, save_steps=1, **kwargs)
    shutil.copytree(tmp_path / "one" / "checkpoint-1", tmp_path / "two" / "checkpoint-1")
    shutil.copytree(tmp_path / "one" / "checkpoint-1", tmp_path / "three" / "checkpoint-1")
    again, _ = watched(tmp_path / "two", tokenizer, resume=True, save_steps=1, **kwargs)
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
    for template in ({"domain": HINT + "!"}, {"general": HINT, "domain": HINT}):
        with pytest.raises(ResumeError, match=r"teacher_prompt: \{.*\} then, \{.*\} now"):
            watched(tmp_path / "three", tokenizer, resume=True, save_steps=1, **{**kwargs, "teacher_prompt": template})


def test_rollouts_that_were_kept_are_scored_with_the_teachers_prompt(start_server, tmp_path, tokenizer):
    def run(server, folder, resume=None, dies=False):
        teachers = {"general": make_model(2), "domain": server.url}
        trainer = make_trainer(
            tmp_path / folder, tokenizer, teachers=teachers, teacher_timeout=0.3, max_steps=2, **TURNED
        )
        roll_out = trainer.roll_out

        def dying(rows, *limits):
            if dies and rows[0]["branch"] == "domain":
                server.before = server.close
            return roll_out(rows, *limits)

        trainer.roll_out = dying
        try:
            trainer.train(resume_from_checkpoint=resume)
        finally:
            trainer.teachers["domain"].close()
        return [parameter.detach().clone() for parameter in trainer.model.parameters()]

    server = start_server()
    expected = run(server, "one")
    with pytest.raises(TeacherError):
        run(server, "two", dies=True)
    found = run(start_server(port=server.port), "two", resume=str(tmp_path / "two" / "checkpoint-1"))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert lines(tmp_path / "two")[1]["loss"] == lines(tmp_path / "one")[1]["loss"]


# ---------------------------------------------------------------------------------------------------------- templates


@pytest.mark.parametrize(
    ("template", "prompt", "expected"),
    [
        (HINT, "2?", "you know it is 7. 2?"),
        (HINT, user("2?"), user("you know it is 7. 2?")),
        (SYSTEM, user("2?"), [{"role": "system", "content": "be kind"}, *user("now 2? please")]),
        (
            SYSTEM,
            [*user("1?"), {"role": "assistant", "content": "yes"}, *user("{x}")],
            [{"role": "system", "content": "be kind"}, *user("1?"), {"role": "assistant", "content": "yes"},
             *user("now {x} please")],
        ),
        ([*ONE, *user("{prompt}")], [{"role": "system", "content": "s"}, *user("2?")],
         [{"role": "system", "content": "s"}, *ONE, *user("2?")]),
        (HINT, [{"role": "system", "content": "s"}, *user("2?")],
         [{"role": "system", "content": "s"}, *user("you know it is 7. 2?")]),
        (HINT, [*user("2?"), {"role": "assistant", "content": "it"}],
         [*user("you know it is 7. 2?"), {"role": "assistant", "content": "it"}]),
    ],
    ids=["text", "one message", "system", "conversation", "system and examples", "own system", "goes on"],
)  # fmt: skip
def test_fill_puts_the_prompt_in_its_place(template, prompt, expected):
    before = copy.deepcopy((template, prompt))
    assert fill(template, prompt) == expected
    assert (template, prompt) == before


TEXTS = st.text(st.sampled_from("ab {}.\n"), max_size=8)


@given(TEXTS, TEXTS, st.lists(st.tuples(st.sampled_from(["user", "assistant"]), TEXTS), max_size=4), TEXTS)
def test_fill_keeps_all_that_the_student_sees(before, after, turns, last):
    messages = [{"role": role, "content": text} for role, text in turns]
    found = fill(before + "{prompt}" + after, [*messages, *user(last)])
    assert found[:-1] == messages
    assert found[-1] == {"role": "user", "content": f"{before}{last}{after}"}


@pytest.mark.parametrize(
    ("template", "prompt", "message"),
    [
        (SYSTEM, "2?", "has a text as its prompt, and the teacher_prompt of its branch is messages"),
        (HINT, [{"role": "system", "content": "s"}], "has no user message"),
        (SYSTEM, [{"role": "system", "content": "s"}, *user("2?")], "has a system message, 's', and so has"),
    ],
)
def test_fill_says_what_does_not_fit(template, prompt, message):
    with pytest.raises(ValueError, match=message):
        fill(template, prompt)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"domain": "think first"}, r"teacher_prompt of branch 'domain' has no \{prompt\} where a prompt could stand"),
        ({"domain": [{"role": "system", "content": "{prompt}"}]}, r"has no \{prompt\} where"),
        ({"domain": [*SYSTEM, {"role": "assistant", "content": "so"}]}, r"has no \{prompt\} where"),
        (
            {"domain": [{"role": "system", "content": "of {prompt}"}, *user("{prompt}")]},
            r"has \{prompt\} in a message of the system, too, where the teacher would read just that",
        ),
        (
            {"domain": [{"role": "judge", "content": "{prompt}"}]},
            "teacher_prompt of branch 'domain' has the role 'judge'",
        ),
        ({"domain": 7}, r"has no \{prompt\} where"),
        ({"maths": HINT}, r"has a template for 'maths', but the branches of the schedule are \['general', 'domain'\]"),
        (HINT, "teacher_prompt must map branches to templates, got 'you know"),
    ],
)
def test_template_is_refused_before_anything_is_loaded(given, message, make_config):
    with pytest.raises(ValueError, match=message):
        make_config(teacher_prompt=given)


def test_templates_come_from_the_command_line_as_json(make_config):
    assert make_config(teacher_prompt='{"domain": "a {prompt}"}').teacher_prompt == {"domain": "a {prompt}"}
    assert read_templates({"domain": '[{"role": "user", "content": "{prompt}"}]'}, ["domain"]) == {
        "domain": user("{prompt}")
    }


# ------------------------------------------------------------------------------------------ which branches, which rows


def stream(rows, streamed=False):
    dataset = Dataset.from_list(rows)
    return PromptStream(dataset.to_iterable_dataset() if streamed else dataset, "domain", 0)


WITH, WITHOUT = [{"prompt": "a", "teacher_prompt": "b a"}], [{"prompt": "a"}]


@pytest.mark.parametrize("streamed", [False, True])
def test_contexts_are_those_of_templates_and_columns(streamed):
    streams = {"domain": stream(WITH, streamed), "general": stream(WITHOUT, streamed)}
    assert contexts_of({"general": HINT}, streams, {}, {}) == {"domain": None, "general": HINT}
    assert contexts_of(None, {"domain": stream(WITHOUT, streamed)}, {}, {}) == {}


@pytest.mark.parametrize(
    ("templates", "rows", "held_out", "message"),
    [
        (
            {"domain": HINT},
            WITH,
            None,
            "has a teacher_prompt in the config, and its prompts have a column of that name",
        ),
        (None, WITH, WITHOUT, "'teacher_prompt' is missing from its held-out prompts"),
        (None, WITHOUT, WITH, "'teacher_prompt' is in its held-out prompts, but its prompts of training have none"),
        (None, WITHOUT, None, "'self', the student as it is, and sees the same prompt: all gaps would be 0"),
    ],
)
def test_contexts_that_contradict_each_other_are_refused(templates, rows, held_out, message):
    held = {"domain": Dataset.from_list(held_out)} if held_out else {}
    with pytest.raises(ValueError, match=message):
        contexts_of(templates, {"domain": stream(rows)}, held, {"domain": "self"})


def test_row_without_what_the_others_have_is_refused_before_the_model_is_loaded(tmp_path, tokenizer):
    rows = [{"prompt": "a", "teacher_prompt": "b a"}, {"prompt": "a", "teacher_prompt": None}]
    with pytest.raises(
        ValueError,
        match=r"row 1 of branch 'domain' has the 'teacher_prompt' 'None', where others have a text or messages",
    ):
        make_trainer(
            tmp_path, tokenizer, model="no such model",
            train_dataset={"general": make_prompts("general"), "domain": Dataset.from_list(rows)},
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ how prompts end

THINKING = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>"
    "{% if enable_thinking is defined and not enable_thinking %}.. {% endif %}{% endif %}"
)


def readers(contexts, template=None, limit=64, tokenizer=None):
    tokenizer = tokenizer or make_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    reader = PromptReader(tokenizer, tokenizer, len(tokenizer), [], None, {})
    return reader, TeacherPrompts(reader, tokenizer, contexts, limit)


def seen(row, contexts, **more):
    """What the teacher sees of a row of the branch "b", in `check` and then in `ids`."""
    reader, prompts = readers(contexts, **more)
    row = {"branch": "b", "row": "row 3", **row}
    prompts.check({"b": [row]})
    (ids,) = prompts.ids([row], reader.ids([row]))
    return ids


@pytest.mark.parametrize(
    ("row", "message"),
    [
        # the student's own template has been applied by hand, and in the other mode
        (
            {"prompt": user("a"), "teacher_prompt": "<user>b a<assistant>.. "},
            "ends with '.*', and the prompt of the student",
        ),
        ({"prompt": "<user>a<assistant>.. ", "teacher_prompt": user("b a")}, "ends with"),
        (
            {"prompt": user("a"), "teacher_prompt": [*user("b a"), {"role": "assistant", "content": "so"}]},
            "ends with 'so",
        ),
        ({"prompt": user("a"), "teacher_prompt": "b a"}, "ends with"),
    ],
)
def test_prompts_that_end_otherwise_are_refused(row, message):
    with pytest.raises(ValueError, match=f"the teacher_prompt of row 3 {message}"):
        seen(row, {"b": None}, template=THINKING)


def test_prompts_in_the_same_mode_end_alike():
    row = {"prompt": user("a"), "teacher_prompt": user("b a"), "chat_template_kwargs": {"enable_thinking": False}}
    tokenizer = make_tokenizer()
    assert seen(row, {"b": None}, template=THINKING) == tokenizer("<user>b a<assistant>.. ")["input_ids"]
    row = {"prompt": user("a"), "teacher_prompt": "<user>b a<assistant>"}
    assert seen(row, {"b": None}, template=THINKING) == tokenizer("<user>b a<assistant>")["input_ids"]
    assert seen({"prompt": "a? "}, {"b": HINT + " or not"}) == tokenizer("you know it is 7. a?  or not")["input_ids"]


def test_prompt_of_a_teacher_that_is_too_long_is_refused_and_not_cut():
    with pytest.raises(ValueError, match="the teacher_prompt of row 3 has 20 tokens, and max_prompt_length is 19"):
        seen({"prompt": "a?"}, {"b": HINT}, limit=19)
    assert len(seen({"prompt": "a?"}, {"b": HINT}, limit=20)) == 20


def byte_tokenizer():
    """One token for each byte, so that a Japanese character has three."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.WordLevel({token: place for place, token in enumerate(["<unk>", *alphabet])}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(False, use_regex=False), pre_tokenizers.Split("", "isolated")]
    )
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


@pytest.mark.parametrize("place", [0, 1, 2])
def test_rows_of_fewer_characters_and_more_tokens_are_refused_beforehand(place):
    rows = [
        {"prompt": "a", "teacher_prompt": text, "row": f"row {at}"} for at, text in enumerate(["a" * 40, "b" * 30])
    ]
    _, prompts = readers({"b": None}, limit=44, tokenizer=byte_tokenizer())
    prompts.check({"b": rows})
    rows.insert(place, {"prompt": "a", "teacher_prompt": "\u3042" * 15, "row": "the row"})
    with pytest.raises(ValueError, match=r"^the teacher_prompt of the row has 45 tokens, and max_prompt_length is 44"):
        prompts.check({"b": rows})
    readers({"b": None}, limit=45, tokenizer=byte_tokenizer())[1].check({"b": rows})
    # Which no row could exceed: the largest alone is encoded, to compare the ends.
    reader, prompts = readers({"b": None}, limit=100, tokenizer=byte_tokenizer())
    encoded, ids = [], reader.ids
    reader.ids = lambda rows: encoded.extend(row["prompt"] for row in rows) or ids(rows)
    prompts.check({"b": rows})
    assert encoded == ["a", "\u3042" * 15]


def test_rows_whose_special_tokens_are_encoded_as_text_are_measured_so():
    """Where a larger row has fewer tokens, thanks to its chat template's."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<assistant>"]})
    tokenizer.chat_template = THINKING
    reader = PromptReader(tokenizer, tokenizer, len(tokenizer), [], None, {}, split_special_tokens=True)
    rows = [
        {"prompt": "a", "teacher_prompt": "a" * 30 + "<assistant>", "row": "row 0"},
        {"prompt": user("a"), "teacher_prompt": user("b" * 25), "row": "row 1"},
    ]
    TeacherPrompts(reader, tokenizer, {"b": None}, 41).check({"b": rows})
    with pytest.raises(ValueError, match="the teacher_prompt of row 0 has 41 tokens, and max_prompt_length is 40"):
        TeacherPrompts(reader, tokenizer, {"b": None}, 40).check({"b": rows})


def test_row_that_lacks_what_its_teacher_is_to_see_is_refused():
    """As one of a stream, whose columns nobody knows beforehand."""
    message = (
        "branch 'b': the column 'teacher_prompt' is missing from row 3. The teacher would see something else there than in "
        "training. Give all prompts of the branch that column, or none."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        seen({"prompt": "a?"}, {"b": None})


def test_row_of_a_branch_without_context_has_none():
    assert seen({"prompt": "a?"}, {}) is None
    with pytest.raises(ValueError, match="branch 'b': the column 'teacher_prompt' is in row 3, but"):
        reader, prompts = readers({})
        prompts.ids(
            [{"branch": "b", "row": "row 3", "prompt": "a", "teacher_prompt": "b"}], reader.ids([{"prompt": "a"}])
        )
