"""Options by their likelihood (camopd/eval/likelihood.py): by hand on a tiny model, and with `-m eval` beside lm-eval."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import LOGP, make_forward, make_model, make_tokenizer
from tokenizers.processors import TemplateProcessing

from camopd import cli
from camopd.eval import jobs, likelihood, rows
from camopd.eval.compare import asked_otherwise, compare
from camopd.eval.likelihood import answer, encoded, likelihoods, texts
from camopd.eval.scores import items_of, read_answers
from camopd.eval.tasks import TASKS


QASC = TASKS["qasc_options"]
QUESTIONS = [
    {"question": f"what is {word}", "options": {"A": "a cat", "B": word * 2, "C": "red house"}, "answer": "ABC"[n % 3]}
    for n, word in enumerate(["sun", "tree", "dog", "go", "he", "she", "it"])
]
ROWS = [QASC.convert(question) for question in QUESTIONS]
SUM = 40 * LOGP  # of the tokens of an option, one a character


def plain_tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


TOKENIZERS = pytest.mark.parametrize("tokenizer", [make_tokenizer(), plain_tokenizer()], ids=["template", "plain"])


def by_hand(model, tokenizer, row):
    """The log-likelihoods of a row's options: of each token alone, from the logits of a forward of its own."""
    found = []
    for option in (row[letter] for letter in "ABC"):
        if tokenizer.chat_template:
            chat = [{"role": "user", "content": f"Question: {row['question']}\nAnswer:"}]
            before = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        else:
            before, option = f"Question: {row['question']}\nAnswer:", f" {option}"
        ids = tokenizer(before + option, add_special_tokens=False)["input_ids"]
        start = len(tokenizer(before.rstrip(), add_special_tokens=False)["input_ids"])
        with torch.no_grad():
            logps = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        found.append(sum(logps[at - 1, ids[at]].item() for at in range(start, len(ids))))
    return found


@pytest.fixture
def job(tmp_path):
    """Does the job of a model on all rows, and gives its answers."""

    def job(tokenizer=None, most=512):
        model = make_model(1)
        model.config.max_position_embeddings = most
        shutil.rmtree(tmp_path / "model", ignore_errors=True)  # and the template of a model before
        model.save_pretrained(tmp_path / "model")
        (tokenizer or make_tokenizer()).save_pretrained(tmp_path / "model")
        told = jobs.job_of(QASC, tmp_path, str(tmp_path / "model"), None, None, 4)
        jobs.prepare(QASC, told, "weights", ROWS, tmp_path)
        likelihood.main(str(tmp_path / jobs.JOB), str(tmp_path / jobs.ANSWERS))
        return read_answers(tmp_path / jobs.ANSWERS)

    return job


@TOKENIZERS
def test_score_is_of_the_likeliest_option_per_character_and_worked_by_hand(job, tokenizer):
    model, both = make_model(1), []
    for row, found in zip(ROWS, job(tokenizer), strict=True):
        sums = by_hand(model, tokenizer, row)
        assert found["likelihoods"] == pytest.approx(sums, abs=SUM)
        gold, lengths = "ABC".index(row["answer"]), [len(row[letter]) for letter in "ABC"]
        best = max(range(3), key=[value / length for value, length in zip(sums, lengths, strict=True)].__getitem__)
        assert found["scores"] == {"acc": float(sums.index(max(sums)) == gold), "acc_norm": float(best == gold)}
        assert found["text"] == f"{'ABC'[best]}. {row['ABC'[best]]}"
        both.append((sums.index(max(sums)), best))
    assert any(first != second for first, second in both)  # else the length would not matter here


def test_items_have_both_scores_and_nothing_that_was_cut_off():
    found = [answer(0, ROWS[0], [-3.0, -3.5, -8.0], "x"), answer(1, ROWS[1], [-9.0, -1.0, -8.0], "x")]
    assert [each["scores"] for each in found] == [{"acc": 1, "acc_norm": 0}, {"acc": 1, "acc_norm": 1}]
    items = items_of(QASC, found)
    assert [(item.score, item.truncated, item.unparsed) for item in items] == [(0, None, None), (1, None, None)]
    (row,) = compare([QASC], {"m": {"qasc_options": items}})
    assert row["models"]["m"]["parts"] == {"acc": 100, "acc_norm": 50} and row["models"]["m"]["mean"] == 0.5


def test_killed_job_goes_on_where_it_stopped(job, tmp_path, monkeypatch):
    monkeypatch.setattr(likelihood, "KEPT", 2)
    whole = job()
    done = tmp_path / "work" / "predictions" / likelihood.DONE
    lines = done.read_text(encoding="utf-8").splitlines(keepends=True)
    assert jobs.answered(tmp_path) == len(lines) == len(ROWS)
    (tmp_path / jobs.ANSWERS).unlink()
    done.write_text("".join(lines[:3]) + lines[3][:20], encoding="utf-8")
    asked, ask = [], likelihood.likelihoods
    monkeypatch.setattr(likelihood, "likelihoods", lambda of, pairs: asked.append(len(pairs)) or ask(of, pairs))
    found = job()
    assert found[:3] == whole[:3] and asked == [6, 6]
    for each, before in zip(found, whole, strict=True):  # of other batches, and so rounded otherwise
        assert each.pop("likelihoods") == pytest.approx(before.pop("likelihoods"), abs=SUM) and each == before


def test_items_that_a_killed_job_has_done_twice_or_out_of_order_count_once(job, tmp_path):
    whole = job()
    done = tmp_path / "work" / "predictions" / likelihood.DONE
    lines = done.read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / jobs.ANSWERS).unlink()
    done.write_text("".join([lines[4], lines[1], lines[4], *lines[1:3]]), encoding="utf-8")  # five lines, three items
    assert [each["item"] for each in job()] == [each["item"] for each in whole] == list(range(len(ROWS)))


def test_options_weighed_in_another_way_are_not_gone_on_with(job, tmp_path):
    job()
    (tmp_path / jobs.ANSWERS).unlink()
    done = tmp_path / "work" / "predictions" / likelihood.DONE
    lines = done.read_text(encoding="utf-8").splitlines(keepends=True)
    done.write_text("".join(lines[:2]), encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"weighed with its chat template, in float32 on cpu, and now it is without a"
    ):
        job(plain_tokenizer())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_likelihood_that_is_not_finite_is_refused_with_its_row(job, value, tmp_path, monkeypatch):
    ask = likelihood.likelihoods
    monkeypatch.setattr(likelihood, "likelihoods", lambda of, pairs: [*ask(of, pairs)[:-1], value])
    with pytest.raises(
        ValueError, match=rf"options of 'what is it' have the log-likelihoods .*{value}.* float16 may overflow"
    ):
        job()
    assert not (tmp_path / jobs.ANSWERS).exists()


@pytest.mark.parametrize(("end", "opens"), [("<think>\n", True), ("<think>\n\n</think>\n\n", False), ("", False)])
def test_chat_template_that_opens_reasoning_is_refused(job, end, opens):
    tokenizer = make_tokenizer()
    tokenizer.chat_template += f"{{{{ {end!r} }}}}"
    if not opens:
        assert len(job(tokenizer)) == len(ROWS)
        return
    with pytest.raises(ValueError, match=r"opens reasoning .<think>. before an answer.* take the one of letters"):
        job(tokenizer)


@pytest.mark.parametrize("writes", ["tokenizer", "template", "both", "nobody"])
def test_beginning_of_a_text_is_there_once(writes):
    """As in lm-eval: a template that writes it is not given a second one."""
    tokenizer = make_tokenizer()
    if writes in ("tokenizer", "both"):
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", None, [("<s>", 1)])
    tokenizer.chat_template = (
        f"{{{{ bos_token }}}}{tokenizer.chat_template}" if writes in ("template", "both") else None
    )
    for ids, start in encoded(tokenizer, ROWS[0]):
        assert (ids.count(1), ids[:1] == [1]) == ((0, False) if writes == "nobody" else (1, True))
        assert 0 < start < len(ids)


def test_length_of_an_option_is_counted_in_characters():
    row = {"question": "x", "A": "\u00e9" * 4, "B": "e" * 5, "answer": "A"}  # 4 characters, 8 bytes
    assert answer(0, row, [-4.0, -5.5], "x")["scores"] == {"acc": 1, "acc_norm": 1}


def test_first_of_two_options_that_are_as_likely_is_taken():
    row = {"question": "x", "A": "no", "B": "go", "C": "he", "answer": "B"}
    assert answer(0, row, [-3.0, -2.0, -2.0], "x")["text"] == "B. go"


def test_models_that_were_asked_in_other_ways_are_compared_with_a_note():
    found = {
        model: {"qasc_options": items_of(QASC, [answer(0, ROWS[0], [-3.0, -3.5, -8.0], how)])}
        for model, how in (("start", "with its chat template"), ("result", "without a chat template"))
    }
    (note,) = asked_otherwise([QASC], found)
    assert "qasc_options was asked of start with its chat template; result without a chat template" in note
    assert asked_otherwise([QASC], {"start": found["start"], "other": found["start"]}) == []


def test_length_of_answers_is_no_part_of_a_job_without_any(tmp_path):
    told = [jobs.job_of(QASC, tmp_path, "m", None, most, 4) for most in (None, 5)]
    assert told[0] == told[1]


def test_row_without_room_is_refused_before_the_first_forward(job):
    with pytest.raises(ValueError, match=r"have \d+ tokens, and the model .* has 30 positions .*Leave those rows out"):
        job(most=30)


def test_option_without_text_is_refused():
    with pytest.raises(ValueError, match="an option without text, which has no likelihood"):
        QASC.convert({**QUESTIONS[0], "options": {"A": "x", "B": " "}})


def test_rows_are_those_of_the_task_of_letters(tmp_path):
    (tmp_path / "qasc.jsonl").write_text(json.dumps(QUESTIONS[0]) + "\n", encoding="utf-8")
    assert rows.read(QASC, rows.find(QASC, tmp_path, {}), None) == ROWS[:1]
    (tmp_path / "mine.jsonl").write_text(json.dumps(QUESTIONS[1]) + "\n", encoding="utf-8")
    mine = rows.find(QASC, tmp_path, {"qasc": tmp_path / "mine.jsonl"})
    assert rows.read(QASC, mine, None) == ROWS[1:2]
    own = {"qasc": tmp_path / "mine.jsonl", "qasc_options": tmp_path / "qasc.jsonl"}
    assert rows.find(QASC, tmp_path, own) == tmp_path / "qasc.jsonl"


def test_url_is_refused_before_anything_is_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        cli.main(["eval", "--tasks", "qasc_options", "--models", "m=http://127.0.0.1:9"])
    said = " ".join(capsys.readouterr().err.split())
    assert "'m' is at http://127.0.0.1:9, and the task qasc_options needs the likelihood of each option" in said
    assert "Name its folder, --models m=PATH, or leave the task out" in said


@pytest.mark.slow
def test_command_weighs_the_options_of_two_models_without_a_server(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, seed in (("one", 1), ("two", 2)):
        make_model(seed).save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in QUESTIONS), encoding="utf-8")
    words = ["--models", "start=./one", "result=./two", "--data", "qasc_options=rows.jsonl"]
    monkeypatch.setenv("CAMOPD_EVAL_PYTHON", "not-there")  # nor is evalscope needed
    (tmp_path / "random.py").write_text("raise ImportError('a file of the user')\n", encoding="utf-8")
    cli.main(["eval", "--tasks", "qasc_options", *words])
    assert "7 of 926 | - / - | - / - |" in capsys.readouterr().out
    found = read_answers(tmp_path / "eval-output" / "result" / "qasc_options" / jobs.ANSWERS)
    sums = [by_hand(make_model(2), make_tokenizer(), row) for row in ROWS]
    assert [each["likelihoods"] for each in found] == [pytest.approx(each, abs=SUM) for each in sums]


@pytest.mark.eval
@TOKENIZERS
def test_likelihoods_are_those_of_lm_eval(tokenizer):
    from lm_eval.models.huggingface import HFLM

    model = make_model(1)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    for row in ROWS:
        requests = [SimpleNamespace(args=pair) for pair in texts(tokenizer, row)]
        theirs = [value for value, _ in lm.loglikelihood(requests, disable_tqdm=True)]
        assert likelihoods(make_forward(model), encoded(tokenizer, row)) == pytest.approx(theirs, abs=SUM)
