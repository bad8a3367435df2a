"""What the settings of the method and its baselines may be, and what has to fit together.

What transformers and TRL bring is in setting_rules.py.
"""

from __future__ import annotations

import json
import logging
import math
from contextlib import suppress
from typing import Any

from . import guards, ranges
from .objective import IMPORTANCE_MODES, SCORE_KINDS
from .ranges import Range
from .schedule import Schedule, by_step, mapping_form, number_of, short
from .settings import OLD_NAMES
from .teacher_prompts import read_templates
from .teachers.address import is_server, key_variables, public_url, refuse_secrets, urls_and_model, without_secrets
from .token_rules import TOKEN_RULES, TokenRule
from .vllm.limits import completion_seconds, most_tokens_in_flight, request_seconds


logger = logging.getLogger(__name__)


RANGES = (
    *ranges.RANGES,
    ranges.choice("importance_sampling_mode", *IMPORTANCE_MODES),
    Range("token_rule", lambda value: value in TOKEN_RULES, f"one of {tuple(TOKEN_RULES)}"),
)
SELECTIONS: dict[str, bool | str] = {"true": True, "false": False, "random": "random", "smallest": "smallest"}
PER_BRANCH = (
    Range(
        "mass_target", lambda value: 0 < value <= 1, "in (0, 1]",
        " It is a share of the total score (Eq. 8). To train on every sample, set selection to False.",
    ),
    Range(
        "scale", lambda value: 0 < value < math.inf, "a positive number",
        " It is r_b of Eq. 9. To leave a branch out, take it out of the schedule.",
    ),
    Range("score", SCORE_KINDS.__contains__, f"one of {SCORE_KINDS}", " They are Eq. 6 and Eq. 7."),
    Range("selection", tuple(SELECTIONS.values()).__contains__, f"one of {tuple(SELECTIONS)}"),
)  # fmt: skip
OF_A_NEW_BRANCH = {"mass_target": 0.8, "scale": 1.0, "score": "absolute", "selection": True}
# optim that transformers builds from the learning rate and `adam_*` alone
PLAIN_ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused")


def take_old_names(args: Any) -> None:
    """Give settings under their old names to the new ones, with a warning. Raises `ValueError` where both are set."""
    for old, new in OLD_NAMES.items():
        given = value = getattr(args, old)
        if given is None:
            continue
        if old == "score_batch_size" and all(type(number) is int for number in (given, args.max_prompt_length)):
            value = given * (args.max_prompt_length + args.longest_completion)
        if getattr(args, new) not in (args.__dataclass_fields__[new].default, value):
            raise ValueError(f"{old}={given!r} is the old name of {new}={getattr(args, new)!r}. Leave it out.")
        logger.warning("%s is called %s now, and the old name will go. Set %s=%r", old, new, new, value)
        setattr(args, new, value)
        setattr(args, old, None)


def check_values(args: Any) -> None:
    """Raise `ValueError` for a value that is out of its range, and for JSON that cannot be read.

    For the beginning: what follows reads these settings.
    """
    for rule in RANGES:
        for name in rule.names.split():
            value = getattr(args, name)
            if value is not None or args.__dataclass_fields__[name].default is not None:
                ranges.check(rule, name, value)
    args.guards = guards.settle(args.guards)
    settle_eval_tasks(args)
    args.rollout_servers = urls_of(args.rollout_servers, args.use_vllm)
    if args.rollout_lag and not args.rollout_servers:
        raise ValueError(
            "rollout_lag=1 has servers write a step's completions while the step before trains, and there are none. Set "
            "rollout_servers, or leave rollout_lag out."
        )
    if args.rollout_lag and args.student_logps == "engine":
        raise ValueError(
            "student_logps='engine' with rollout_lag=1 would take the log-probs of weights of before the last update for "
            "the student's. Leave student_logps at 'trainer'."
        )
    for name in (*(rule.names for rule in PER_BRANCH), "teachers", "teacher_prompt"):
        value = getattr(args, name)
        if isinstance(value, str) and value.lstrip().startswith("{"):
            try:
                json.loads(value)
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{name} is not valid JSON: {without_secrets(value)[:500]} ({error}). Names and texts need double "
                    f'quotes: --{name} \'{{"general": ..., "domain": ...}}\'.'
                ) from None


def urls_of(given: Any, use_vllm: bool) -> list[str] | None:
    """`rollout_servers` as a list: of a URL, of several with commas between, or of a list of them, in JSON as well.

    Raises `ValueError` for anything else, and beside `use_vllm`.
    """
    urls = given
    if isinstance(given, str):
        with suppress(ValueError, RecursionError):  # of the command line
            urls = json.loads(given)
        urls = [url.strip() for url in urls.split(",") if url.strip()] if isinstance(urls, str) else urls
    if not urls:
        return None
    if not is_server(urls) or isinstance(urls, dict):
        raise ValueError(
            f"rollout_servers must be URLs of vLLM servers, got {without_secrets(short(given))}. Write "
            "rollout_servers: [http://host:8000]."
        )
    if use_vllm:
        raise ValueError(
            "rollout_servers and use_vllm=True are two ways to roll out. Leave use_vllm out, or rollout_servers: with "
            "use_vllm, vllm_server_base_url names TRL's server."
        )
    return list(urls)


def read_completion_length(args: Any) -> int:
    """Leave the largest length where the parent looks for a number, and the schedule in `completion_lengths`."""
    name = "max_completion_length"
    given: Any = args.max_completion_length
    if isinstance(given, str) and given.lstrip().startswith("{"):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name} is not valid JSON: {given[:300]} ({error}).") from None
    steps = by_step(name, given)
    if args.completion_lengths is not None and not isinstance(given, dict):
        known = by_step("completion_lengths", args.completion_lengths)  # of a config that is copied
        if len(steps) == 1 and max(known.values()) == max(steps.values()):
            steps = known
        elif given == args.__dataclass_fields__[name].default:
            raise ValueError(
                f"completion_lengths={short(args.completion_lengths)} is derived; give the schedule as {name}."
            )
    if isinstance(args.max_steps, int) and 0 < args.max_steps <= max(steps):
        raise ValueError(
            f"{name} changes at step {max(steps)}, but the run ends after max_steps={args.max_steps} steps (0 to "
            f"{args.max_steps - 1}). Raise max_steps, or leave that entry out."
        )
    args.max_completion_length = max(steps.values())
    args.completion_lengths = steps if len(steps) > 1 else None
    return int(args.max_completion_length)


def derive_accumulation(args: Any, world_size: int) -> None:
    """Set `gradient_accumulation_steps`, which follows from `prompts_per_step`. Raises `ValueError` where it cannot."""
    per_pass = world_size * args.per_device_train_batch_size
    if args.prompts_per_step % per_pass:
        below = args.prompts_per_step - args.prompts_per_step % per_pass
        wanted = f"{below} or {below + per_pass}" if below else f"{per_pass}"
        raise ValueError(
            f"prompts_per_step={args.prompts_per_step} does not divide into passes of {world_size} ranks x "
            f"per_device_train_batch_size={args.per_device_train_batch_size} = {per_pass} sequences: "
            f"{args.prompts_per_step} / {per_pass} = {args.prompts_per_step / per_pass:.3f}. Set prompts_per_step to "
            f"{wanted}, or change per_device_train_batch_size or the number of ranks."
        )
    derived = args.prompts_per_step // per_pass
    if args.gradient_accumulation_steps not in (None, derived):
        raise ValueError(
            f"gradient_accumulation_steps={args.gradient_accumulation_steps} contradicts "
            f"prompts_per_step={args.prompts_per_step}, which makes it {args.prompts_per_step} / ({world_size} ranks x "
            f"{args.per_device_train_batch_size}) = {derived}. Leave it out, in a copy of a config set it to None, or set "
            f"prompts_per_step to {max(1, args.gradient_accumulation_steps) * per_pass}."
        )
    args.gradient_accumulation_steps = derived


def settle_spellings(args: Any) -> None:
    """Two ways to say the same become one, and what `to_dict` writes for a token is none. Raises `ValueError` for a token,
    and for two that differ."""
    if args.hub_token == "<HUB_TOKEN>":  # as `to_dict` writes every token, set or not
        args.hub_token = None
    elif args.hub_token is not None:
        raise ValueError(
            "hub_token would be stored in training_args.bin, which lies beside the model and is sent to the Hub. Leave "
            "it out, and set HF_TOKEN or run `hf auth login`."
        )
    for name, off, also_off in (("top_k", 0, -1), ("min_p", None, 0.0)):
        if getattr(args, name) == also_off:
            setattr(args, name, off)
    for name in ("model_init_kwargs", "teacher_model_init_kwargs"):
        kwargs = getattr(args, name)
        if kwargs and "torch_dtype" in kwargs:  # its name before, which would lose to the default of `dtype`
            kwargs = dict(kwargs)
            dtype = kwargs.pop("torch_dtype")
            if str(kwargs.setdefault("dtype", dtype)).removeprefix("torch.") != str(dtype).removeprefix("torch."):
                raise ValueError(f"{name} has dtype={kwargs['dtype']!r} and torch_dtype={dtype!r}. Leave one out.")
            setattr(args, name, kwargs)


def settle_eval_tasks(args: Any) -> None:
    """`eval_tasks` as a list, of one name or of several with commas between. Raises `ValueError` for anything else."""
    given: Any = args.eval_tasks
    found = [name.strip() for name in given.split(",")] if isinstance(given, str) else given
    if found is not None and (
        not isinstance(found, list) or not all(isinstance(name, str) and name for name in found)
    ):
        raise ValueError(
            f"eval_tasks must be names of tasks of lm-eval, got {short(given)}. Write eval_tasks: [ifeval]."
        )
    args.eval_tasks = list(dict.fromkeys(found)) if found else None


def check_method(args: Any, schedule: Schedule) -> None:
    """Raise `ValueError` for a setting of the method that does not fit another one; per-branch values become numbers and
    truth values, and are checked."""
    _check_schedule(args, schedule)
    _give_defaults(args, schedule)
    for rule in PER_BRANCH:
        name, value = rule.names, getattr(args, rule.names)
        if isinstance(value, dict):
            value = {branch: _parse(f"{name}[{branch!r}]", name, item) for branch, item in value.items()}
        else:
            value = _parse(name, name, value)
        setattr(args, name, value)
        for branch, item in args.per_branch(name).items():
            ranges.check(rule, f"{name} of branch {branch!r}", item)
    _check_optimizer(args)
    _check_divergence(args)
    _check_budget(args)
    _check_teachers(args)
    args.teacher_prompt = read_templates(args.teacher_prompt, schedule.branches)
    if args.branch_weights == "sigma" and all(len(shares) == 1 for shares in schedule.steps):
        raise ValueError(
            f"branch_weights='sigma' compares the branches inside a step, but no step of schedule {args.schedule!r} "
            "mixes any: every weight would be 1. Mix them ('general:1+domain:1'), or leave branch_weights out and set "
            "scale."
        )
    if not 0 <= args.importance_sampling_low <= 1 <= args.importance_sampling_high:
        raise ValueError(
            f"importance_sampling_low={args.importance_sampling_low} and "
            f"importance_sampling_high={args.importance_sampling_high} must enclose 1, the ratio of two engines that "
            "agree: 0 <= low <= 1 <= high. The default band is 0.5 to 2.0."
        )


def _give_defaults(args: Any, schedule: Schedule) -> None:
    """Give a branch the values of per-branch settings that it lacks, and say so in a line."""
    for branch in schedule.branches:
        taken = {}
        for rule in PER_BRANCH:
            name, value = rule.names, getattr(args, rule.names)
            if isinstance(value, dict) and branch not in value:
                of_paper = args.__dataclass_fields__[name].default_factory()
                taken[name] = of_paper.get(branch, OF_A_NEW_BRANCH[name])
                setattr(args, name, {**value, branch: taken[name]})
        if taken and args.process_index == 0:
            said = ", ".join(f"{name} {value}" for name, value in taken.items())
            logger.warning(
                "branch %r has no values of its own: %s. To change one, set %s: {%s: ...}",
                branch, said, next(iter(taken)), branch,
            )  # fmt: skip


def without_effect(args: Any) -> list[tuple[str, Any, str]]:
    """Values of a branch that selects nothing, beside one that does; as `setting_rules.without_effect` gives settings."""
    selects = args.per_branch("selection")
    found = []
    for name, read in (("mass_target", ""), ("score", ", and but for it only metrics and the guard zero_gap read it")):
        values, of_paper = getattr(args, name), args.__dataclass_fields__[name].default_factory()
        for branch in selects if isinstance(values, dict) and any(selects.values()) else ():
            if not selects[branch] and values[branch] != of_paper.get(branch, OF_A_NEW_BRANCH[name]):
                found.append((f"{name}[{branch!r}]", values[branch], f"selection is off in that branch{read}"))
    return found


def _check_schedule(args: Any, schedule: Schedule) -> None:
    for step in range(schedule.period):
        for branch, rows in schedule.rows(step, args.prompts_per_step).items():
            if rows == 0:
                raise ValueError(
                    f"schedule {args.schedule!r} gives branch {branch!r} none of the {args.prompts_per_step} prompts "
                    f"of step {step}. Raise prompts_per_step or the branch's share."
                )
    drawn = schedule.rows_before(args.max_steps, args.prompts_per_step) if args.max_steps > 0 else {}
    for branch in (branch for branch, rows in drawn.items() if rows == 0 and args.process_index == 0):
        logger.warning(
            "branch %r is never trained: schedule %s has none of it in the first %d steps, and max_steps is %d.",
            branch, args.schedule, args.max_steps, args.max_steps,
        )  # fmt: skip


def _check_optimizer(args: Any) -> None:
    optim = str(getattr(args.optim, "value", args.optim))
    if optim in ("lomo", "adalomo") or optim.endswith("_layerwise"):
        raise ValueError(
            f"optim={optim!r} changes the weights in the backward of every micro-batch, but a rollout is for one "
            "update of them all (Eq. 9). Leave optim out, or take adamw_torch_8bit to save memory (docs/scale.md)."
        )
    if args.optim_args and (optim in (*PLAIN_ADAMW, "adafactor") or args.optimizer_moments == "per_branch"):
        raise ValueError(f"optim_args={args.optim_args!r} would be ignored: optim={optim!r} takes none. Leave it out.")
    if args.optimizer_moments == "per_branch" and optim not in PLAIN_ADAMW:
        raise ValueError(
            f"optimizer_moments='per_branch' is an AdamW of its own and cannot be optim={optim!r}. Leave optim out."
        )


def _check_divergence(args: Any) -> None:
    """Raise `ValueError` where what is in place of the sampled gap does not fit the rest."""
    exact = args.divergence != "sampled"
    if exact and args.baseline != "none":
        raise ValueError(
            f"baseline={args.baseline!r} takes noise out of the sampled gap, and divergence={args.divergence!r} does not "
            "sample it. Leave one of them out."
        )
    rule = TOKEN_RULES[args.token_rule]
    asked = f"divergence={args.divergence!r}" if exact else f"baseline={args.baseline!r}"
    if args.divergence == "top_k" and args.token_rule != "none":
        raise ValueError(
            f"token_rule={args.token_rule!r} would not be used: divergence='top_k' is a rule of its own, for what it reads "
            "of the teacher. Leave one of them out."
        )
    if (exact or args.baseline != "none") and rule.advantages is not TokenRule.advantages:
        raise ValueError(
            f"token_rule={args.token_rule!r} is about the sampled gap, in whose place {asked} puts another number. Leave "
            "one of them out."
        )
    if (exact or args.baseline != "none") and args.branch_weights != "none":
        raise ValueError(
            f"branch_weights={args.branch_weights!r} is about the spread of the sampled gaps, in whose place {asked} puts "
            "another number. Leave one of them out."
        )
    if (exact or args.baseline != "none") and args.rebalance and args.world_size > 1:
        raise ValueError(
            f"{asked} needs what the teacher sees and says of a sample, which rebalance=True leaves on the rank that has "
            "asked for it. Set rebalance=False."
        )


def _check_budget(args: Any) -> None:
    budget = args.max_tokens_per_micro_batch
    if budget is None:
        return
    longest = args.max_prompt_length + args.longest_completion
    if budget < longest:
        raise ValueError(
            f"max_tokens_per_micro_batch={budget} is smaller than one sample: max_prompt_length + "
            f"max_completion_length = {args.max_prompt_length} + {args.longest_completion} = {longest}. Raise it to "
            f"{longest} or lower the lengths."
        )
    if args.per_device_train_batch_size != 1:
        raise ValueError(
            f"max_tokens_per_micro_batch={budget} decides how many samples share a micro-batch, and so would "
            f"per_device_train_batch_size={args.per_device_train_batch_size}. Leave the second at 1."
        )


def _check_teachers(args: Any) -> None:
    if args.teachers is not None and not isinstance(args.teachers, dict):
        raise ValueError(without_secrets(mapping_form("teachers", args.teachers)))
    servers = {branch: teacher for branch, teacher in (args.teachers or {}).items() if is_server(teacher)}
    for branch, teacher in (args.teachers or {}).items():
        if isinstance(teacher, str) and branch not in servers:
            refuse_secrets(branch, teacher)
    for branch, teacher in servers.items():
        for url in urls_and_model(teacher)[0]:
            if public_url(url) != url:  # it would be in training_args.bin, which is sent to the Hub
                raise ValueError(
                    f"the teacher of branch {branch!r} is at {public_url(url)}, and its URL has a user, a password or a "
                    f"query, which would be in files and logs. Set {' or '.join(key_variables(str(branch)))} instead."
                )
    check_ddp_timeout(args, bool(servers))


def check_ddp_timeout(args: Any, teacher_served: bool) -> None:
    """Raise `ValueError` where a rank may wait for a server longer than the other ranks wait for it: for one request that
    times out, then for a server to come back, then for another such request. All ranks meet between rollouts and scores, so
    each wait is looked at by itself."""
    if args.world_size == 1:
        return
    if args.rollout_servers:
        longest = args.longest_completion
        _check_wait(args, completion_seconds(longest), f"a rollout server, for a completion of {longest} tokens")
    if not teacher_served:
        return
    rows = args.prompts_per_step // args.world_size
    if args.eval_strategy != "no" or args.eval_on_start:
        rows = max(rows, args.per_device_eval_batch_size)
    tokens = most_tokens_in_flight(rows, args.max_prompt_length + args.longest_completion)
    _check_wait(args, request_seconds(tokens), f"a teacher's server, with {tokens} tokens of this rank in flight")


def _check_wait(args: Any, request: float, what: str) -> None:
    slowest = math.ceil(args.teacher_timeout + 2 * request)
    if slowest > args.ddp_timeout:
        raise ValueError(
            f"a request to {what}, may take {request:.0f} seconds. Two of them and teacher_timeout="
            f"{args.teacher_timeout:g} come to {slowest}, more than ddp_timeout={args.ddp_timeout}: a rank that waits for "
            f"its server would be taken for dead. Set it to {slowest}, or lower teacher_timeout or max_completion_length."
        )


def _parse(shown: str, name: str, value: Any) -> Any:
    """A per-branch value as the number, text or truth value that the setting has."""
    try:
        if name == "score":
            return str(value)
        if name == "selection":
            return SELECTIONS[str(value).lower()]
        if isinstance(value, bool):
            raise ValueError
        return number_of(value) if isinstance(value, str) else float(value)
    except (KeyError, TypeError, ValueError, OverflowError):
        kind, more = "a number", ""
        if name == "selection":
            kind, more = "true or false", " There are two controls, 'random' and 'smallest'."
        raise ValueError(
            f"{shown} must be {kind} or a mapping from branch to that, got {short(value)}.{more}"
        ) from None
