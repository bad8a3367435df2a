"""Can these teachers teach this student? Asked before the first rollout, and by `camopd check`.

A teacher that is wrong in silence (another template, lost weights, other tokens) costs a run and not an error message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import torch
from torch import Tensor

from ..errors import CaMOPDError, TeacherError
from ..surroundings import short_context
from ..tokens import ends_of
from .address import is_loopback, same_model
from .base import Teacher, TokenScores
from .vllm.teacher import ServerTeacher


if TYPE_CHECKING:  # its import takes seconds, and a server that is not there needs none of it
    from transformers import PreTrainedTokenizerBase

# Mean |log-prob difference| per token between two engines with the same weights: some 5e-5 nats in float32, some more in
# bfloat16. Above the first bound a look at the settings is due, above the second they hold different weights.
ENGINE_GAP_WARNING, ENGINE_GAP_ERROR = 0.05, 0.5
ABOVE_NORMALISED = (
    1e-4  # nats above 0 that rounding to float32 stays below; the probabilities of several add up to more
)
# Teachers of one origin with the student start at some 0.04 nats/token, a foreign one at 0.19, from which distillation is
# much harder: https://arxiv.org/abs/2606.30406.
INITIAL_KL_WARNING = 0.1
LIKELIEST = 5  # tokens that a server is asked for, and that a look is taken at where a run asks for more
VOCABULARY_PROBES = 256  # tokens spread over the vocabulary
# Texts whose token ids differ between tokenizer families: spaces, digits, code, accents, CJK, an emoji.
PROBE_TEXTS = ("The capital of  France is Paris.\n\n", "def f(x):\n    return x ** 2 + 31415", "Çéß 東京 😀")
PROBE_CONVERSATIONS = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("What is 7 times 8?", "7 times 8 is 56."),
    ("Which planet is known as the red planet?", "Mars is known as the red planet."),
    ("Name three primary colours.", "Three primary colours are red, yellow and blue."),
)
PROBE_MESSAGES = [{"role": "user", "content": PROBE_CONVERSATIONS[0][0]}]


@dataclass(frozen=True)
class Finding:
    """One line of `camopd check`. `text` says what was found and, unless it is "ok", the way out."""

    branch: str
    subject: str
    level: Literal["ok", "warning", "error"]
    text: str


@dataclass(frozen=True)
class Probe:
    """Conversations in the student's own tokens: `token_ids` = prompt + answer + end, `ends` all tokens that may end it."""

    token_ids: list[list[int]]
    prompt_lens: list[int]
    ends: list[int] = field(default_factory=list)

    @classmethod
    def of(
        cls, tokenizer: PreTrainedTokenizerBase, max_tokens: int, eos_token_ids: int | Iterable[int] | None = None
    ) -> Probe:
        """Those of `PROBE_CONVERSATIONS` that fit into `max_tokens`; the first one cut, if none does.

        `eos_token_ids` are those of the student's generation config.
        """
        token_ids, prompt_lens = [], []
        ends = ends_of(tokenizer, eos_token_ids)
        for question, answer in PROBE_CONVERSATIONS:
            if tokenizer.chat_template:
                messages = [{"role": "user", "content": question}]
                prompt = _rendered(tokenizer, messages)
            else:
                prompt = tokenizer(question + "\n")["input_ids"]
            ids = [*prompt, *tokenizer(answer, add_special_tokens=False)["input_ids"], ends[0]]
            token_ids.append(list(ids))
            prompt_lens.append(len(prompt))
        fitting = [row for row, ids in enumerate(token_ids) if len(ids) <= max_tokens]
        if not fitting:
            cut = len(token_ids[0]) - max_tokens
            return cls([token_ids[0][cut:]], [max(1, prompt_lens[0] - cut)], ends)
        return cls([token_ids[row] for row in fitting], [prompt_lens[row] for row in fitting], ends)


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])


def check_server(
    branch: str, teacher: ServerTeacher, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> Iterable[Finding]:
    """What a server says of itself: context, tokenizer, chat template, and whether a key travels in the open."""
    yield reachable(branch, teacher)
    open_urls = [url for url in teacher.urls if _sends_key_in_the_open(url)] if teacher.has_key else []
    if open_urls:
        yield Finding(
            branch, "key", "warning",
            f"the API key travels unencrypted to {', '.join(open_urls)}; use https unless that network is yours alone",
        )  # fmt: skip
    try:
        teacher.check_context(max_tokens)
        yield Finding(branch, "context", "ok", f"{teacher.max_model_len} tokens, {max_tokens + 1} needed")
    except TeacherError as error:
        yield Finding(branch, "context", "error", str(error))
    yield _check_tokenizer(branch, teacher, tokenizer)
    if tokenizer.chat_template:
        yield _check_template(branch, teacher, tokenizer)


def reachable(branch: str, teacher: ServerTeacher) -> Finding:
    served = ", ".join(f"{url} ({transport})" for url, transport in teacher.transports.items())
    return Finding(branch, "reachable", "ok", f"{teacher.name} at {served}")


def _sends_key_in_the_open(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme == "http" and not is_loopback(parts.hostname or "")


def tokenizer_probes(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts that reach all kinds of tokens: ordinary ones, added and special ones, and some all over the vocabulary."""
    added = sorted(tokenizer.get_added_vocab()) + [str(token) for token in tokenizer.all_special_tokens]
    step = max(1, len(tokenizer) // VOCABULARY_PROBES)
    spread = " ".join(tokenizer.decode([token]) for token in range(0, len(tokenizer), step))
    return [*PROBE_TEXTS, *([" a ".join(added)] if added else []), spread]


def _check_tokenizer(branch: str, teacher: ServerTeacher, tokenizer: PreTrainedTokenizerBase) -> Finding:
    probes = tokenizer_probes(tokenizer)
    compared = 0
    for text in probes:
        ours = tokenizer(text, add_special_tokens=False)["input_ids"]
        try:
            answers = teacher.ask("/tokenize", {"prompt": text, "add_special_tokens": False})
        except TeacherError as error:
            return Finding(branch, "tokenizer", "error", str(error))
        for url, answer in answers.items():
            theirs = _tokens(answer)
            if theirs != ours:
                both = min(len(theirs), len(ours))
                place = next((i for i in range(both) if theirs[i] != ours[i]), both)
                piece = tokenizer.decode(ours[max(0, place - 2) : place + 3])
                return Finding(
                    branch, "tokenizer", "error",
                    f"teacher {branch!r} at {url} has another tokenizer than the student: around {piece!r} the ids are "
                    f"{theirs[max(0, place - 2) : place + 3]} there and {ours[max(0, place - 2) : place + 3]} "
                    "here. Its log-probs would be those of other words. Use a teacher of the same family, or start it "
                    "with --tokenizer set to the student's if only added tokens differ",
                )  # fmt: skip
        compared += len(ours)
    return Finding(branch, "tokenizer", "ok", f"the same ids for {compared} tokens of probe texts")


def _tokens(answer: Any) -> list[int]:
    tokens = answer.get("tokens") if isinstance(answer, dict) else None
    # Of anything else the tokenizer here could not say which text it is.
    known = isinstance(tokens, list) and all(type(token) is int and 0 <= token < 2**31 for token in tokens)
    return list(tokens) if known and isinstance(tokens, list) else []


def _check_template(branch: str, teacher: ServerTeacher, tokenizer: PreTrainedTokenizerBase) -> Finding:
    try:
        answers = teacher.ask("/tokenize", {"messages": PROBE_MESSAGES, "add_generation_prompt": True})
    except TeacherError as error:
        return Finding(
            branch, "chat template", "warning",
            f"the server renders none ({error}); start it with --chat-template set to the student's to compare",
        )  # fmt: skip
    rendered = {url: _tokens(answer) for url, answer in answers.items()}
    return _compare_rendered(branch, rendered, tokenizer, "--chat-template")


def compare_templates(
    branch: str, name: str, tokenizer: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase
) -> Finding | None:
    """Whether a teacher in the process, called `name`, writes a conversation as the student does; `None` where the student
    has no template. The tokenizers have the same tokens."""
    if not tokenizer.chat_template:
        return None
    way_out = "chat_template.jinja in the teacher's folder"
    if not theirs.chat_template:
        return Finding(
            branch, "chat template", "warning",
            f"{name} has none, so it may be a base model that knows no conversations; if it has learned the student's, put "
            f"{way_out}",
        )  # fmt: skip
    return _compare_rendered(branch, {name: _rendered(theirs, PROBE_MESSAGES)}, tokenizer, way_out)


def _compare_rendered(
    branch: str, rendered: dict[str, list[int]], tokenizer: PreTrainedTokenizerBase, way_out: str
) -> Finding:
    """`rendered` has what each URL or model makes of `PROBE_MESSAGES`."""
    ours = _rendered(tokenizer, PROBE_MESSAGES)
    for name, theirs in rendered.items():
        if theirs != ours:
            return Finding(
                branch, "chat template", "warning",
                f"{name} writes a conversation as {tokenizer.decode(theirs)!r}, the student as "
                f"{tokenizer.decode(ours)!r}. The teacher will see prompts in a form it may not know; if that is not "
                f"meant, give student and teacher the same template ({way_out})",
            )  # fmt: skip
    return Finding(branch, "chat template", "ok", "the same prompt for a conversation")


def check_scores(
    branch: str,
    teacher: Teacher,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    probe: Probe,
    student_logps: list[Tensor],
    same_weights: bool,
    likeliest: int = 0,
) -> Iterable[Finding]:
    """What a teacher answers: finite, normalised and not uniform; near the student where it has the student's weights.

    Args:
        vocab_size: tokens that the student can write, the rows of its head.
        probe: what to score.
        student_logps: the student's own log-probs of it, (T_i,) each.
        same_weights: whether the teacher is the very model the student starts from.
        likeliest: how many of its likeliest tokens to ask for, at least; a server is asked for `LIKELIEST` always.
    """
    is_server = isinstance(teacher, ServerTeacher)
    try:
        scores = teacher.score(probe.token_ids, probe.prompt_lens)
        most = max(LIKELIEST if is_server else 0, likeliest)
        tops = teacher.score(probe.token_ids, probe.prompt_lens, top_k=most) if most else scores
    except CaMOPDError as error:
        yield Finding(branch, "log-probs", "error", str(error))
        return
    logps = torch.cat([row.logps for row in scores])
    yield _check_distribution(branch, teacher, logps, tops, vocab_size)
    gap = torch.cat(student_logps).cpu() - logps
    mean = gap.abs().mean().item()
    if same_weights:
        fate = f"it has the student's weights and differs from the trainer by {mean:.2g} nats per token"
        if mean > ENGINE_GAP_ERROR:
            yield Finding(
                branch, "self-gap", "error",
                f"{fate}, where 0 is right: other weights stand behind {teacher.name!r}. Start the server again from the "
                "student's own path, with its --dtype and without --quantization",
            )  # fmt: skip
        elif mean > ENGINE_GAP_WARNING:
            yield Finding(
                branch, "self-gap", "warning",
                f"{fate}; two engines in the same dtype differ by less. Give the server the trainer's --dtype",
            )  # fmt: skip
        else:
            yield Finding(branch, "self-gap", "ok", fate)
    if tops[0].top_ids is not None:
        yield _check_end(branch, tokenizer, probe.ends, tops)
    if is_server:
        yield from _check_last_token(branch, teacher, probe.token_ids[0][0], vocab_size)


def _check_distribution(
    branch: str, teacher: Teacher, logps: Tensor, tops: list[TokenScores], vocab_size: int
) -> Finding:
    if has_lost_its_weights(logps):
        return Finding(
            branch, "log-probs", "error",
            f"{teacher.name!r} gives every token the log-prob {logps.mean():.3f}, as -ln(vocabulary size): it has lost its "
            "weights (after a sleep without wake-up, for example). Start it again",
        )  # fmt: skip
    masses = [row.top_logps[:, :LIKELIEST].exp().sum(-1) for row in tops if row.top_logps is not None]
    most, least = (max(m.max().item() for m in masses), min(m.min().item() for m in masses)) if masses else (1.0, 1.0)
    # Five of V tokens, the likeliest, hold at least 5 / V; half of it allows for a teacher with a padded vocabulary.
    if logps.max() > ABOVE_NORMALISED or most > 1 + 10 * ABOVE_NORMALISED or least < 2.5 / vocab_size:
        return Finding(
            branch, "log-probs", "error",
            f"{teacher.name!r} answers {logps.min():.2f} to {logps.max():.2f} as log-probs and {least:.2g} to {most:.2g} "
            "as the probability of the five likeliest tokens: these are not normalised log-probs. Start the server with "
            "--logprobs-mode raw_logprobs",
        )  # fmt: skip
    # At temperature 1, which is what was asked for, raw and processed log-probs are the same.
    return Finding(branch, "log-probs", "ok", f"finite, normalised, asked for at T = 1; mean {logps.mean():.2f} nats")


def has_lost_its_weights(logps: Tensor) -> bool:
    """Whether a server finds all tokens equally and hardly likely: -ln V, whatever its vocabulary size V is."""
    return len(logps) > 1 and bool(logps.max() - logps.min() < 1e-3) and bool(logps.mean() < -3)


def _check_last_token(branch: str, teacher: Teacher, first: int, vocab_size: int) -> Iterable[Finding]:
    """An error where a server cannot score the last token that the student can write: its head may be narrower."""
    try:
        teacher.score([[first, vocab_size - 1]], [1])
    except CaMOPDError as error:
        yield Finding(
            branch, "vocabulary", "error",
            f"it does not score id {vocab_size - 1} ({str(error).strip().rstrip('.')}). If it has no such token: "
            f"{narrower_head(vocab_size)}",
        )  # fmt: skip


def check_local(
    branch: str,
    name: str,
    known: int,
    context: float,
    student_size: int,
    max_tokens: int,
    tokenizer: PreTrainedTokenizerBase,
    theirs: PreTrainedTokenizerBase | None,
) -> Finding:
    """The first thing that is wrong with a teacher in the process, by what is known without a forward.

    Args:
        name: of its model, for messages.
        known: tokens that it has log-probs of.
        context: tokens of a sequence that it was made for.
        student_size: tokens that the student can write, the rows of its head.
        max_tokens: of the longest sequence of the run.
        tokenizer: the student's.
        theirs: the teacher's; `None` for a model that was loaded elsewhere and comes without.
    """
    from .local import check_same_tokens

    who = f"the teacher of branch {branch!r}"
    template = None
    try:
        if theirs is not None:
            check_same_tokens(tokenizer, theirs, branch)
            template = compare_templates(branch, name, tokenizer, theirs)
        if student_size > known:
            raise ValueError(f"{who} does not fit: {narrower_head(student_size, known)}.")
        if max_tokens > context:
            raise ValueError(short_context(branch, context, max_tokens))
    except ValueError as error:
        return Finding(branch, "in the process", "error", str(error))
    if template is not None and template.level == "warning":
        return template
    return Finding(
        branch, "in the process", "ok", f"{name}, not on a server: the same tokens as the student, context fits"
    )


def narrower_head(student: int, teacher: int | None = None) -> str:
    """Why a teacher with fewer tokens than the student is refused, and the way out.

    Heads are padded to round numbers, so models of one family have different ones. The student can draw any row of its own,
    if hardly ever one that no tokenizer uses. The teacher's log-prob of it is -inf, not a gap, and it could not read
    what stands behind it either; a floor in its place would be a number of ours and not the teacher's, and to forbid the
    token would draw from another distribution than the one that is trained. Rows that nobody uses can be cut instead.
    """
    knows = "does not know them all" if teacher is None else f"knows {teacher}"
    rows = "the teacher's number of tokens" if teacher is None else str(teacher)
    return (
        f"the student can write {student} tokens, the rows of its head, and the teacher {knows}: a token it does not have "
        "cannot be scored. Where the student's tokenizer uses no more, cut its head with "
        f"model.resize_token_embeddings({rows}) and save it; otherwise use a teacher of the same family"
    )


def _check_end(branch: str, tokenizer: PreTrainedTokenizerBase, ends: list[int], tops: list[TokenScores]) -> Finding:
    """`ends`: any of them is an end, as a turn of Gemma's or Phi's ends with another token than a sequence."""
    last = [row.top_ids[-1, :LIKELIEST].tolist() for row in tops if row.top_ids is not None]
    expected = sum(not set(ends).isdisjoint(likeliest) for likeliest in last)
    names = " or ".join(repr(token) for token in tokenizer.convert_ids_to_tokens(ends))
    text = f"{names} is among its five likeliest tokens after {expected} of {len(tops)} complete answers"
    if expected * 2 >= len(tops):
        return Finding(branch, "end of sequence", "ok", text)
    return Finding(
        branch, "end of sequence", "warning",
        f"{text}. A teacher that ends its answers otherwise teaches the student not to end them, and completions grow to "
        "the limit. Is it a base model, or made with another end token?",
    )  # fmt: skip


def initial_kl(branch: str, kl: float, tokens: int) -> Finding:
    """The sampled reverse KL of the student's own first completions, in nats per token."""
    text = f"{kl:z.3f} nats per token over {tokens} tokens of the student's own"
    if kl > INITIAL_KL_WARNING:
        return Finding(
            branch, "initial KL", "warning",
            f"{text}, above {INITIAL_KL_WARNING}. That is as it should be where a long fine-tuning has moved the student "
            "away from this teacher: watch gap/*/mean. If not, see whether this is the model the student was made from",
        )  # fmt: skip
    return Finding(branch, "initial KL", "ok", text)


def is_student_start(teacher: Any, student: str) -> bool:
    """Whether a teacher says that it is the model the student starts from, by name or path."""
    return any(same_model(name, student) for name in (teacher.name, getattr(teacher, "model_path", teacher.name)))


def nothing_to_learn(branches: Iterable[str]) -> Finding:
    """The warning where the teachers of all branches of a run are the model the student starts from."""
    return Finding(
        "student", "teachers", "warning",
        f"the teachers of {', '.join(map(repr, branches))} are all the student itself, so there is nothing to learn from "
        "them. Give the branch that is to recover the model from before the fine-tuning",
    )  # fmt: skip


def raise_errors(
    findings: Iterable[Finding], warn: Callable[[str], None], error: type[Exception] = TeacherError
) -> None:
    """Raise the first error; hand each warning to `warn`."""
    for finding in findings:
        if finding.level == "error":
            named = finding.text.startswith(("teacher ", "the teacher of "))
            raise error(finding.text if named else f"teacher {finding.branch!r}: {finding.text}")
        if finding.level == "warning":
            warn(f"teacher {finding.branch!r}, {finding.subject}: {finding.text}")
