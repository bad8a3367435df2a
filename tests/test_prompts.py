"""The prompt streams: every rank, world size, epoch and resume must see the rows the schedule says, and no others."""

import itertools

import pytest
from conftest import make_model
from datasets import Dataset, DatasetDict, IterableDataset
from datasets.distributed import split_dataset_by_node
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from trainers import make_trainer

from camopd.messages import read_row
from camopd.prompts import (
    PromptReader,
    PromptStream,
    StepDataset,
    check_prompts,
    held_out,
    named,
    rows_to_check,
)
from camopd.record import fingerprint
from camopd.schedule import Schedule


SCHEDULES = ["general:3,domain:1", "general:3+domain:1", "a+b+c"]
WORLD_SIZES = [1, 2, 3, 4]
SIZES = {"general": 11, "domain": 5, "a": 11, "b": 5, "c": 7}  # rows; no multiple of anything a step takes


def make_rows(name, count):
    return [{"prompt": f"{name} {index}"} for index in range(count)]


def generate_rows(name, count):
    yield from make_rows(name, count)


# The same rows behind every class a user may pass.
KINDS = {
    "Dataset": lambda name, count: Dataset.from_list(make_rows(name, count)),
    "to_iterable_dataset": lambda name, count: Dataset.from_list(make_rows(name, count)).to_iterable_dataset(3),
    "from_generator": lambda name, count: IterableDataset.from_generator(
        generate_rows, gen_kwargs={"name": name, "count": count}
    ),
}


@pytest.fixture(params=list(KINDS))
def make_dataset(request):
    return KINDS[request.param]


def make_dealer(
    schedule, rows_per_step, make_dataset=KINDS["Dataset"], rank=0, world_size=1, seed=42, shuffle=True, sizes=SIZES
):
    """A dealer with fresh streams, as a process that has just started has it."""
    parsed = Schedule.parse(schedule)
    streams = {name: PromptStream(make_dataset(name, sizes[name]), name, seed, shuffle) for name in parsed.branches}
    return StepDataset(streams, parsed, rows_per_step, num_steps=40, rank=rank, world_size=world_size)


def prompts_of(rows):
    return [row["prompt"] for row in rows]


def drawn(dealer, num_steps, branch="a"):
    """Prompts of one branch over the first steps, one after the other."""
    rows = itertools.chain.from_iterable(dealer.rows_of(step) for step in range(num_steps))
    return [row["prompt"] for row in rows if row["branch"] == branch]


# --- ranks and world sizes ---------------------------------------------------------------------------------------


def test_mixed_step_of_eight_rows_on_two_ranks_is_dealt_as_worked_out_by_hand():
    # general:3+domain:1 of 8 rows: places 0-5 are general, 6-7 domain. Even places go to rank 0, odd ones to rank 1.
    ranks = [make_dealer("general:3+domain:1", 8, rank=rank, world_size=2, shuffle=False) for rank in (0, 1)]
    dealt = [[(row["prompt"], row["branch"], row["position"]) for row in dealer.rows_of(0)] for dealer in ranks]
    assert dealt[0] == [
        ("general 0", "general", 0),
        ("general 2", "general", 2),
        ("general 4", "general", 4),
        ("domain 0", "domain", 6),
    ]
    assert dealt[1] == [
        ("general 1", "general", 1),
        ("general 3", "general", 3),
        ("general 5", "general", 5),
        ("domain 1", "domain", 7),
    ]
    # Step 1 goes on at general 6 (5 rows are left of 11, then the next epoch's first) and domain 2.
    assert prompts_of(ranks[0].rows_of(1)) == ["general 6", "general 8", "general 10", "domain 2"]
    assert prompts_of(ranks[1].rows_of(1)) == ["general 7", "general 9", "general 0", "domain 3"]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_ranks_all_get_the_branch_of_the_schedule(world_size):
    for rank in range(world_size):
        dealer = make_dealer("general:3,domain:1", 12, rank=rank, world_size=world_size)
        branches = [{row["branch"] for row in dealer.rows_of(step)} for step in range(8)]
        assert branches == [{"general"}, {"general"}, {"general"}, {"domain"}] * 2


@pytest.mark.parametrize("rows_per_step", [12, 10])  # 10 does not divide by 3 or 4
@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_union_over_ranks_is_the_same_global_batch_for_every_world_size(
    schedule, world_size, rows_per_step, make_dataset
):
    alone = make_dealer(schedule, rows_per_step, make_dataset)
    ranks = [make_dealer(schedule, rows_per_step, make_dataset, rank, world_size) for rank in range(world_size)]
    for step in range(6):
        union = [row for dealer in ranks for row in dealer.rows_of(step)]
        union.sort(key=lambda row: row["position"])
        assert [row["position"] for row in union] == list(range(rows_per_step))
        assert union == alone.rows_of(step)
        counts = {branch: sum(row["branch"] == branch for row in union) for branch in alone.schedule.shares(step)}
        assert counts == alone.schedule.rows(step, rows_per_step)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ranks_get_their_share_of_every_branch_in_order_of_position(schedule, world_size):
    ranks = [make_dealer(schedule, 12, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in range(4):
        dealt = [dealer.rows_of(step) for dealer in ranks]
        assert [len(rows) for rows in dealt] == [12 // world_size] * world_size
        for branch in ranks[0].schedule.shares(step):
            shares = [sum(row["branch"] == branch for row in rows) for rows in dealt]
            assert max(shares) - min(shares) <= 1
        for rows in dealt:
            positions = [row["position"] for row in rows]
            assert positions == sorted(positions)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.dictionaries(st.sampled_from("abc"), st.integers(1, 5), min_size=1).map(
            lambda step: "+".join(f"{name}:{share}" for name, share in step.items())
        ),
        min_size=1,
        max_size=3,
    ),
    st.integers(1, 17),
    st.integers(1, 5),
    st.tuples(*[st.integers(1, 9)] * 3),
    st.booleans(),
)
def test_rows_of_a_branch_come_once_in_an_epoch_whatever_is_dealt(steps, rows_per_step, world_size, sizes, shuffle):
    sizes = dict(zip("abc", sizes, strict=True))
    dealers = [
        make_dealer(",".join(steps), rows_per_step, rank=rank, world_size=world_size, shuffle=shuffle, sizes=sizes)
        for rank in range(world_size)
    ]
    prompts = {name: [] for name in "abc"}
    for step in range(4):
        rows = sorted((row for dealer in dealers for row in dealer.rows_of(step)), key=lambda row: row["position"])
        assert [row["position"] for row in rows] == list(range(rows_per_step))
        for row in rows:
            prompts[row["branch"]].append(row["prompt"])
    for name, drawn_of in prompts.items():
        for start in range(0, len(drawn_of), sizes[name]):
            epoch = drawn_of[start : start + sizes[name]]
            assert len(set(epoch)) == len(epoch) <= sizes[name]


# --- epochs ------------------------------------------------------------------------------------------------------


def test_epochs_each_visit_every_row_once_in_an_order_of_their_own(make_dataset):
    dealer = make_dealer("a", 4, make_dataset)  # 11 steps x 4 rows = 4 epochs of 11 rows
    steps = [dealer.rows_of(step) for step in range(11)]
    assert [len(rows) for rows in steps] == [4] * 11
    prompts = prompts_of(itertools.chain.from_iterable(steps))
    epochs = [tuple(prompts[start : start + 11]) for start in range(0, 44, 11)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(prompts_of(make_rows("a", 11)))
    assert len(set(epochs)) == 4


def test_step_larger_than_the_dataset_goes_on_in_the_next_epochs(make_dataset):
    dealer = make_dealer("a", 10, make_dataset, sizes={"a": 4})
    prompts = drawn(dealer, 2)
    assert len(prompts) == 20
    assert all(sorted(prompts[start : start + 4]) == ["a 0", "a 1", "a 2", "a 3"] for start in range(0, 20, 4))


def test_epochs_of_an_iterable_larger_than_the_shuffle_buffer_visit_every_row_once(monkeypatch):
    monkeypatch.setattr("camopd.prompts.SHUFFLE_BUFFER", 3)
    prompts = drawn(make_dealer("a", 11, KINDS["from_generator"]), 2)
    first, second = prompts[:11], prompts[11:]
    assert sorted(first) == sorted(second) == sorted(prompts_of(make_rows("a", 11)))
    assert first != second


def test_branches_with_the_same_dataset_come_in_different_orders(make_dataset):
    dataset = make_dataset("shared", 11)
    streams = {branch: PromptStream(dataset, branch, seed=0) for branch in ("a", "b")}
    dealer = StepDataset(streams, Schedule.parse("a+b"), rows_per_step=22, num_steps=3)
    for step in range(3):  # each step is one epoch of either branch
        rows = dealer.rows_of(step)
        a, b = ([row["prompt"] for row in rows if row["branch"] == branch] for branch in ("a", "b"))
        assert a != b
        assert sorted(a) == sorted(b) == sorted(prompts_of(make_rows("shared", 11)))


def test_seed_gives_the_same_order_and_another_seed_another(make_dataset):
    first, again, other = (drawn(make_dealer("a", 11, make_dataset, seed=seed), 2) for seed in (1, 1, 2))
    assert first == again
    assert first[:11] != other[:11]
    assert first[11:] != other[11:]


def test_epochs_without_shuffle_keep_the_order_of_the_dataset(make_dataset):
    prompts = drawn(make_dealer("a", 4, make_dataset, shuffle=False), 6)
    assert prompts == (prompts_of(make_rows("a", 11)) * 3)[:24]


# --- resume ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank, world_size", [(0, 1), (1, 2)])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_resume_at_any_step_gives_the_rows_of_a_run_that_was_not_stopped(schedule, rank, world_size, make_dataset):
    walked = make_dealer(schedule, 8, make_dataset, rank, world_size)
    undisturbed = [walked.rows_of(step) for step in range(10)]
    for step in range(10):
        resumed = make_dealer(schedule, 8, make_dataset, rank, world_size)
        assert resumed.rows_of(step) == undisturbed[step]
        if step < 9:
            assert resumed.rows_of(step + 1) == undisturbed[step + 1]


def test_steps_may_be_asked_for_again_and_in_any_order(make_dataset):
    dealer = make_dealer("general:3+domain:1", 8, make_dataset)
    forwards = [dealer.rows_of(step) for step in range(6)]
    assert [dealer.rows_of(step) for step in (5, 0, 3, 3, 1)] == [forwards[step] for step in (5, 0, 3, 3, 1)]


def test_branch_that_rests_draws_nothing():
    # Steps 3 and 7 are domain steps of 4 rows out of 5: the second one starts at draw 4.
    dealer = make_dealer("general:3,domain:1", 4, shuffle=False)
    assert prompts_of(dealer.rows_of(3)) == ["domain 0", "domain 1", "domain 2", "domain 3"]
    assert prompts_of(dealer.rows_of(7)) == ["domain 4", "domain 0", "domain 1", "domain 2"]
    assert prompts_of(dealer.rows_of(4)) == ["general 1", "general 2", "general 3", "general 4"]  # draws 12-15 of 11


# --- the training set the trainer sees ---------------------------------------------------------------------------


def test_first_micro_step_holds_the_whole_step_and_the_others_are_empty_lists():
    parsed = Schedule.parse("a")
    dealer = StepDataset(
        {"a": PromptStream(KINDS["Dataset"]("a", 11), "a", seed=0)},
        parsed,
        rows_per_step=6,
        num_steps=4,
        micro_steps=3,
    )
    assert len(dealer) == 12
    items = [dealer[item] for item in range(12)]
    assert [len(rows) for rows in items] == [6, 0, 0] * 4
    assert items[3] == dealer.rows_of(1)
    assert items[4] == []
    for item in (12, -1):
        with pytest.raises(IndexError):
            dealer[item]


def test_iterating_a_dealer_ends_after_the_last_step():
    dealer = make_dealer("a", 4)
    assert len(list(dealer)) == len(dealer) == 40


def test_worker_processes_of_a_data_loader_get_the_same_rows():
    # Of a Dataset; datasets gives each worker its own shards of an IterableDataset, and the trainer takes no workers.
    dealer = make_dealer("a", 4)
    dealer.num_steps = 6
    loader = DataLoader(dealer, batch_size=1, collate_fn=lambda items: items[0], num_workers=2)
    assert list(loader) == [make_dealer("a", 4).rows_of(step) for step in range(6)]


def test_conversational_prompts_and_other_columns_pass_through():
    messages = [{"role": "user", "content": "hello"}]
    dataset = Dataset.from_list([{"prompt": messages, "source": "nemotron"}])
    stream = PromptStream(dataset, "general", seed=0)
    named = {"branch": "general", "row": "row 0 of branch 'general'"}
    assert list(stream.draw(range(1))) == [{"prompt": messages, "source": "nemotron", **named}]


# --- errors ------------------------------------------------------------------------------------------------------


def test_list_is_refused_with_the_call_that_converts_it():
    with pytest.raises(TypeError, match=r"branch 'general'.*got list.*datasets\.Dataset\.from_list\(rows\)"):
        PromptStream([{"prompt": "x"}], "general", seed=0)


def test_dataset_dict_is_refused():
    with pytest.raises(TypeError, match=r"branch 'general' must be a datasets\.Dataset .*got DatasetDict"):
        check_prompts(DatasetDict(train=KINDS["Dataset"]("a", 2)), "general")


def test_empty_dataset_is_refused_at_once():
    with pytest.raises(ValueError, match=r"branch 'domain' are empty\. Check the path, the split and any filter"):
        PromptStream(Dataset.from_dict({"prompt": []}), "domain", seed=0)


@pytest.mark.parametrize("shuffle", [True, False])
def test_empty_iterable_is_refused_when_it_is_read(shuffle):
    stream = PromptStream(KINDS["from_generator"]("none", 0), "domain", seed=0, shuffle=shuffle)
    with pytest.raises(ValueError, match=r"branch 'domain' are empty\. Check the path, the split and any filter"):
        list(stream.draw(range(1)))


def test_prompts_without_the_column_prompt_are_refused_with_the_columns_there_are():
    dataset = Dataset.from_list([{"text": "x", "id": 1}])
    for prompts in (dataset, dataset.to_iterable_dataset()):
        with pytest.raises(
            ValueError, match=r"'domain' have no column 'prompt', only \['id', 'text'\].*rename_column"
        ):
            check_prompts(prompts, "domain")


USER, ANSWER = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}


@pytest.mark.parametrize("kind", ["Dataset", "to_iterable_dataset", "unknown columns"])
def test_messages_are_prompts_without_the_answer(kind):
    rows = [{"messages": [USER, ANSWER]}, {"messages": [USER, ANSWER, USER]}]
    dataset = Dataset.from_list(rows)
    if kind != "Dataset":
        dataset = (
            dataset.to_iterable_dataset() if kind.startswith("to") else IterableDataset.from_generator(lambda: rows)
        )
    stream = PromptStream(dataset, "domain", seed=0, shuffle=False)
    wanted = [[USER], [USER, ANSWER, USER]]
    assert [row["prompt"] for row in stream.draw(range(2))] == wanted
    marked = list(held_out({"domain": dataset}, Schedule.parse("domain"), "eval_dataset")["domain"])
    assert [row["prompt"] for row in marked] == wanted
    assert all("messages" not in row for row in marked)


@pytest.mark.parametrize("streamed", [False, True])
def test_prompt_that_ends_with_the_assistant_is_refused_or_gone_on_with(streamed):
    dataset = Dataset.from_list([{"prompt": [USER]}, {"prompt": [USER, ANSWER]}])
    dataset = dataset.to_iterable_dataset() if streamed else dataset
    said = (
        r"of branch 'domain'.* has a prompt that ends with an assistant turn, 'y'\. If it is the answer.*prefill=True"
    )
    with pytest.raises(ValueError, match=said):
        list(PromptStream(dataset, "domain", seed=0, shuffle=False).draw(range(2)))
    with pytest.raises(ValueError, match=said):
        held_out({"domain": dataset}, Schedule.parse("domain"), "eval_dataset")
    stream = PromptStream(dataset, "domain", seed=0, shuffle=False, prefill=True)
    assert [row["prompt"][-1] for row in stream.draw(range(2))] == [USER, ANSWER]
    assert len(held_out({"domain": dataset}, Schedule.parse("domain"), "eval_dataset", prefill=True)["domain"]) == 2


@pytest.mark.parametrize("column", ["image", "images"])
def test_image_columns_are_refused(column):
    dataset = Dataset.from_list([{"prompt": "x", column: "cat.png"}])
    for prompts in (dataset, dataset.to_iterable_dataset()):
        with pytest.raises(ValueError, match=f"branch 'general' have a column '{column}': images are not supported"):
            check_prompts(prompts, "general")


@pytest.mark.parametrize("empty", ["", None, []])
def test_row_without_a_prompt_is_refused_at_once_or_from_a_stream_when_it_is_drawn(empty):
    dataset = Dataset.from_list([{"prompt": empty, "source": "nemotron"}])
    with pytest.raises(
        ValueError, match=r"row 0 of branch 'general' has no prompt. Every row needs a non-empty 'prompt'"
    ):
        PromptStream(dataset, "general", seed=0)
    stream = PromptStream(dataset.to_iterable_dataset(), "general", seed=0)
    with pytest.raises(ValueError, match=r"branch 'general' with columns \['prompt', 'source'\] has no prompt"):
        list(stream.draw(range(1)))


def test_image_in_a_stream_of_unknown_columns_is_refused_when_it_is_drawn():
    def rows():
        yield {"prompt": "x", "image": "cat.png"}

    stream = PromptStream(IterableDataset.from_generator(rows), "general", seed=0)
    with pytest.raises(ValueError, match="a row of branch 'general' brings an image: images are not supported"):
        list(stream.draw(range(1)))


def test_generator_without_prompts_is_refused_when_it_is_drawn():
    def rows():
        yield {"text": "x"}

    stream = PromptStream(IterableDataset.from_generator(rows), "general", seed=0)  # its columns are not known yet
    with pytest.raises(ValueError, match=r"branch 'general' with columns \['text'\] has no prompt"):
        list(stream.draw(range(1)))


def test_checking_an_iterable_reads_nothing_of_it():
    def rows():
        raise AssertionError("read")
        yield

    check_prompts(IterableDataset.from_generator(rows), "general")


# --- fingerprints ------------------------------------------------------------------------------------------------


def test_fingerprint_is_the_same_for_the_same_rows_and_differs_for_others():
    rows = make_rows("a", 100)
    original = fingerprint(Dataset.from_list(rows))
    assert original.startswith("100 rows, ")
    assert fingerprint(Dataset.from_list([{**row, "source": "nemotron"} for row in rows])) == original
    others = {
        "first row": [{"prompt": "b"}, *rows[1:]],
        "last row": [*rows[:-1], {"prompt": "b"}],
        "order": rows[::-1],
        "one row less in the middle": rows[:50] + rows[51:],
    }
    seen = {original, *(fingerprint(Dataset.from_list(other)) for other in others.values())}
    assert len(seen) == 1 + len(others)


def test_fingerprint_works_for_one_row_and_for_conversations_and_says_when_it_cannot_tell():
    talk = [[{"prompt": [{"role": "user", "content": text}]}] for text in ("hello", "bye")]
    assert fingerprint(Dataset.from_list(talk[0])) != fingerprint(Dataset.from_list(talk[1]))
    assert fingerprint(KINDS["from_generator"]("a", 3)) == "streamed"


@pytest.mark.parametrize("prompt", ["   ", [{"role": "user", "text": "x"}], [{"role": "user", "content": None}], 5])
def test_malformed_prompt_is_refused_with_its_row_and_the_form_it_should_have(prompt):
    dataset = Dataset.from_list([{"prompt": prompt}])
    with pytest.raises(ValueError, match=r"row 0 of branch 'general' has .* messages with 'role' and 'content'"):
        check_prompts(dataset, "general")


def test_dataset_dict_is_refused_with_the_split_to_choose():
    with pytest.raises(TypeError, match=r"got DatasetDict. Choose one of its splits: dataset\['test'\]"):
        check_prompts(DatasetDict({"test": Dataset.from_list([{"prompt": "x"}])}), "general")


# --- held-out prompts --------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from("ab"), min_size=1, max_size=9), st.integers(1, 3))
def test_held_out_rows_have_their_branch_and_a_position_of_their_own(branches, shards):
    rows = [{"prompt": f"{place}", "branch": branch, "other": 1} for place, branch in enumerate(branches)]
    schedule = Schedule.parse("a,b")
    found = held_out(Dataset.from_list(rows), schedule, "eval_dataset")
    streams = {
        name: Dataset.from_list([row for row in rows if row["branch"] == name]).to_iterable_dataset(
            min(shards, branches.count(name))
        )
        for name in set(branches)
    }
    for by_branch in (found, held_out(streams, schedule, "eval_dataset")):
        assert sorted(by_branch) == sorted(set(branches))
        for name, prompts in by_branch.items():
            assert [row["prompt"] for row in prompts] == [row["prompt"] for row in rows if row["branch"] == name]
            assert [row["branch"] for row in prompts] == [name] * branches.count(name)
            assert [row["position"] for row in prompts] == list(range(branches.count(name)))
        assert sorted(by_branch["prompt"]) == [row["prompt"] for row in rows]
        assert by_branch.select([0]) == {"prompt": by_branch["prompt"][:1]}


def test_stream_of_held_out_prompts_is_checked_when_it_is_read():
    schedule = Schedule.parse("a")
    for rows, message in (([], "the prompts of branch 'a' are empty"), ([{"prompt": ""}], "a row of branch 'a'")):
        stream = IterableDataset.from_generator(lambda rows=rows: iter(rows))
        with pytest.raises(ValueError, match=message):
            held_out(stream, schedule, "eval_dataset")


def test_part_of_a_stream_is_refused():
    part = split_dataset_by_node(KINDS["to_iterable_dataset"]("a", 6), rank=1, world_size=3)
    with pytest.raises(ValueError, match=r"rank 1's part of 3 \(split_dataset_by_node\). Pass the whole stream"):
        check_prompts(part, "a")
    check_prompts(split_dataset_by_node(KINDS["to_iterable_dataset"]("a", 6), rank=0, world_size=1), "a")


# --- bounds ------------------------------------------------------------------------------------------------------


class Untouched:
    """A tokenizer that must not be asked."""

    chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    added_tokens_decoder, all_special_tokens = {}, []

    def __call__(self, *args, **kwargs):
        raise AssertionError("the tokenizer got the prompt")

    def apply_chat_template(self, messages, **kwargs):
        return "".join(message["content"] for message in messages)


@pytest.mark.parametrize("form", [lambda text: text, lambda text: [{"role": "user", "content": text}]])
def test_prompt_of_ten_megabytes_is_refused_before_the_tokenizer_gets_it(form):
    reader = PromptReader(Untouched(), Untouched(), 100, (), None, {})
    rows = [{"prompt": form("a")}, {"prompt": form("a" * 10_000_000)}]
    for call in (
        lambda: reader.check({"general": rows_to_check("general", Dataset.from_list(rows))}),
        lambda: reader.ids([{**rows[1], "row": "row 1 of branch 'general'"}]),
    ):
        with pytest.raises(
            ValueError,
            match=r"^row 1 of branch 'general' has a prompt of 10000000 characters, and 524288 bytes are the most",
        ):
            call()


def test_bound_of_a_prompt_grows_with_the_tokens_it_may_have(tmp_path, tokenizer):
    model = make_model(1)
    model.config.max_position_embeddings = 10**6
    trainer = make_trainer(tmp_path, tokenizer, model=model, teachers={"general": model_like(2), "domain": model_like(3)},
                           max_prompt_length=100_000)  # fmt: skip
    with pytest.raises(
        ValueError, match=r"1600001 characters, and 1600000 bytes are the most.*above 32768 moves this bound, to 16"
    ):
        trainer.reader.ids([{"prompt": "a" * 1_600_001}])


def model_like(seed):
    model = make_model(seed)
    model.config.max_position_embeddings = 10**6
    return model


def test_surrogate_pair_cut_in_half_is_refused_in_words(tokenizer):
    reader = PromptReader(tokenizer, tokenizer, 100, (), None, {})
    for prompt in ("a\ud800", [{"role": "user", "content": "a\ud800"}], '[{"role": "user", "content": "a\\ud800"}]'):
        with pytest.raises(ValueError, match=r"a row has '\\ud800' at character \d of its prompt, one half"):
            reader.ids([named(read_row, {"prompt": prompt})])


def test_lists_in_lists_without_end_are_refused_in_words():
    deep = nested = []
    for _ in range(5000):
        deep.append([])
        deep = deep[0]
    for row in ({"prompt": [{"role": "user", "content": "a", "x": nested}]}, {"prompt": [], "tools": "[" * 10**5}):
        with pytest.raises(ValueError, match=r"^row 3 has (lists or mappings in one another|no prompt)"):
            named(read_row, {**row, "row": "row 3"})
    with pytest.raises(ValueError, match=r"^row 3 has lists or mappings in one another"):
        named(read_row, {"prompt": [{"role": "user", "content": "a"}], "tools": "[" * 10**5, "row": "row 3"})


def test_stream_is_read_once_where_each_step_is_asked_for_twice():
    """As with `rollout_lag`: for the rollouts that begin ahead, and by the loader."""
    read = []

    def rows():
        for number in range(1000):
            read.append(number)
            yield {"prompt": f"prompt {number}"}

    stream = PromptStream(IterableDataset.from_generator(rows), "general", seed=0, shuffle=False)
    dataset = StepDataset({"general": stream}, Schedule.parse("general"), rows_per_step=4, num_steps=10)
    read.clear()  # what was looked at when it was made
    for step in range(10):
        ahead, loaded = dataset.rows_of(step), dataset[step]
        assert ahead == loaded and [row["prompt"] for row in loaded] == [f"prompt {4 * step + at}" for at in range(4)]
        ahead[0]["prompt"] = "changed by its reader"
        assert dataset.rows_of(step) == loaded
    assert len(read) <= 10 * 4 + 1
