"""`camopd check`: will this run work? What `camopd train` would refuse, and whether its teachers can teach its student."""

from __future__ import annotations

import sys
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..errors import CaMOPDError
from ..messages import BYTES_PER_TOKEN, MOST_BYTES, read_row
from ..prompts import PromptReader, rows_to_check
from ..run import need_prompts, parse, read_settings, teachers_of, where_from
from ..schedule import Schedule
from ..teacher_prompts import TeacherPrompts
from ..teachers.address import OWN_TEACHERS, did_you_mean, has_adapter
from ..teachers.check import (
    LIKELIEST,
    PROBE_CONVERSATIONS,
    Finding,
    Probe,
    check_local,
    check_scores,
    check_server,
    initial_kl,
    is_student_start,
    nothing_to_learn,
    reachable,
)
from ..teachers.vllm.teacher import ServerTeacher, connect_servers
from ..tokens import head_size, need_end, unended_turn
from ..words import wrapped
from .train import quiet


def check(config: str, overrides: list[str]) -> None:
    """`camopd check`: a table with a line per finding, and a prompt of each branch as the model will see it, and
    its teacher. Exits with 2 when there is an error, the cheapest checks first."""
    settings = read_settings(config, overrides)
    findings: list[Finding] = []

    def not_reached(branch: str, error: Exception) -> None:
        text = f"{error}{where_from(settings, branch, error)}"
        findings.append(Finding(branch, "reachable", "error", text))

    teachers = connect_servers(teachers_of(settings), failed=not_reached)
    servers = {branch: teacher for branch, teacher in teachers.items() if isinstance(teacher, ServerTeacher)}
    if findings:
        findings += [reachable(branch, teacher) for branch, teacher in servers.items()]
    _stop_on_errors(findings)

    from trl import get_peft_config

    from ..teachers.adapters import check_adapters
    from .check_run import check_context, check_places, check_room

    quiet(bool(settings.get("verbose")))
    prompts, model_args, args = parse(config, overrides)
    if prompts.prompts is not None:
        need_prompts(prompts, args)
    source = {"revision": model_args.model_revision, "trust_remote_code": args.trust_remote_code}
    student = str(model_args.model_name_or_path)
    tokenizer = _tokenizer_of(student, source)
    check_adapters(student, get_peft_config(model_args), teachers.values())
    max_tokens = args.max_prompt_length + args.longest_completion
    mismatches = Schedule.parse(args.schedule).mismatches("teachers", teachers)
    findings += [Finding(branch, "teacher", "error", text) for branch, text in mismatches]
    findings += check_rollouts(args, max_tokens)
    init_kwargs = {"trust_remote_code": args.trust_remote_code, **(args.teacher_model_init_kwargs or {})}
    teacher_source = {name: init_kwargs[name] for name in ("trust_remote_code", "revision") if name in init_kwargs}
    model_config = _config_of(student, source)
    student_size = model_config.get_text_config().vocab_size
    for branch, teacher in teachers.items():
        if isinstance(teacher, ServerTeacher):
            findings += check_server(branch, teacher, tokenizer, max_tokens)
        elif teacher in tuple(OWN_TEACHERS):
            findings.append(check_adapter(branch, teacher, model_args.use_peft, has_adapter(student)))
        elif teacher is not None:
            findings.append(check_unloaded(branch, teacher, tokenizer, max_tokens, teacher_source, student_size))
    findings += check_places({**settings, "teachers": teachers_of(settings)})
    findings += [
        check_context(args, model_config),
        *check_room(args, model_args, model_config, teachers, teacher_source),
    ]
    found, shown = _check_prompts(prompts, model_args, args, teachers, tokenizer, student_size)
    findings += found
    _stop_on_errors(findings)
    loaded = {**source, "dtype": model_args.dtype}
    top_k = args.divergence_top_k if args.divergence == "top_k" else 0
    findings += _check_with_student(student, teachers, tokenizer, max_tokens, loaded, init_kwargs, top_k)
    _stop_on_errors(findings)
    _show(findings)
    for line in shown:
        print(line)


def _check_prompts(
    prompts: Any, model_args: Any, args: Any, teachers: dict[str, Any], tokenizer: Any, vocab_size: int
) -> tuple[list[Finding], list[str]]:
    """The arguments that `camopd train` gives its trainer, looked at as there, and the prompts among them; a prompt of each
    branch as the model will see it, and its teacher."""
    from trl import get_peft_config, get_quantization_config

    from ..files import load_all
    from ..loss import need_distributions
    from ..setup import PROBED_PROMPTS, prepare
    from .check_run import as_seen, check_prompts

    findings: list[Finding] = []
    shown: list[str] = []
    try:
        need_distributions(args, teachers)
        if prompts.prompts is None:
            return findings, shown
        run = prepare(
            str(model_args.model_name_or_path), teachers, args, load_all(prompts.prompts),
            load_all(prompts.eval_prompts) if prompts.eval_prompts else None, None, [], (None, None),
            get_quantization_config(model_args), get_peft_config(model_args), None,
        )  # fmt: skip
        if run.sampler is not None:
            run.sampler.close()
        reader = PromptReader(
            tokenizer, tokenizer, vocab_size, (), None, args.chat_template_kwargs or {}, args.split_special_tokens,
            max(MOST_BYTES, BYTES_PER_TOKEN * args.max_prompt_length),
        )  # fmt: skip
        teacher_prompts = TeacherPrompts(reader, tokenizer, run.contexts, args.max_prompt_length)
        for branch, stream in run.streams.items():
            rows = list(stream.some(PROBED_PROMPTS))
            findings.append(
                check_prompts(branch, "prompts", rows, len(stream.dataset), reader, args.max_prompt_length)
            )
            shown += as_seen(branch, rows[0], reader, teacher_prompts, tokenizer, args.max_prompt_length)
        for each in (reader, teacher_prompts):
            each.check({branch: rows_to_check(branch, stream.dataset) for branch, stream in run.streams.items()})
            each.check(run.held_out or {})
        for branch, held in (run.held_out or {}).items():
            rows = [read_row(row) for row in islice(held, PROBED_PROMPTS)]
            findings.append(check_prompts(branch, "held-out prompts", rows, len(held), reader, args.max_prompt_length))
    except (CaMOPDError, ValueError, TypeError) as error:
        findings.append(Finding("run", "settings", "error", str(error)))
    return findings, shown


def _tokenizer_of(student: str, source: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(student, **source)
    except (OSError, ValueError) as error:
        raise ValueError(f"the student {student!r} cannot be loaded: {error}{did_you_mean(student)}") from error
    need_end(tokenizer)
    return tokenizer


def _config_of(student: str, source: dict[str, Any]) -> Any:
    from peft import PeftConfig
    from transformers import AutoConfig

    if has_adapter(student):
        return AutoConfig.from_pretrained(PeftConfig.from_pretrained(student).base_model_name_or_path)
    return AutoConfig.from_pretrained(student, **source)


def check_rollouts(args: Any, max_tokens: int) -> list[Finding]:
    """Rollout servers, without giving them weights."""
    from ..rollout_servers import connect

    try:
        sampler = connect(args, max_tokens=max_tokens)
    except CaMOPDError as error:
        return [Finding("rollouts", "servers", "error", str(error))]
    if sampler is None:
        return []
    sampler.close()
    text = f"{sampler.where} serve {sampler.name!r}, {sampler.max_model_len} tokens"
    return [Finding("rollouts", "servers", "ok", text)]


def check_adapter(branch: str, spec: str, use_peft: bool, is_adapter: bool) -> Finding:
    if spec == "self":
        return Finding(branch, spec, "ok", OWN_TEACHERS[spec])
    if spec == "adapter_off":
        if use_peft or is_adapter:
            return Finding(branch, spec, "ok", OWN_TEACHERS[spec])
        return Finding(branch, "adapter_off", "error", "the student has no adapter. Set use_peft, or name a model")
    if is_adapter and not use_peft:
        return Finding(branch, spec, "ok", OWN_TEACHERS[spec])
    return Finding(
        branch, "adapter_start", "error",
        "the student must be a saved adapter, without use_peft. With use_peft, the specialised model is 'adapter_off'",
    )  # fmt: skip


def check_unloaded(
    branch: str, spec: Any, tokenizer: Any, max_tokens: int, source: dict[str, Any], student_size: int
) -> Finding:
    """A teacher in the trainer's process, without loading its weights. `student_size`: tokens the student can write."""
    from transformers import AutoConfig, AutoTokenizer

    from ..teachers.local import context_length, guess_meaning

    way_out = (
        "a folder with a model, a model id of the Hub, the URL of a vLLM server (http://host:port), or 'adapter_off'"
    )
    if not isinstance(spec, str):
        text = f"the teacher is {spec!r} ({type(spec).__name__}). Give {way_out}; several URLs are a list"
        return Finding(branch, "in the process", "error", text)
    try:
        config = AutoConfig.from_pretrained(spec, **source)
        theirs = AutoTokenizer.from_pretrained(spec, **source)
    except (OSError, ValueError) as error:
        text = f"{spec!r} cannot be loaded{guess_meaning(spec)}: {str(error).strip()}\nGive {way_out}"
        return Finding(branch, "in the process", "error", text)
    known, context = config.get_text_config().vocab_size, context_length(config)
    return check_local(branch, spec, known, context, student_size, max_tokens, tokenizer, theirs)


def _check_with_student(
    student: str,
    teachers: dict[str, Any],
    tokenizer: Any,
    max_tokens: int,
    source: dict[str, Any],
    init_kwargs: Any,
    top_k: int,
) -> list[Finding]:
    """Load the student, compare log-probs, and let it write a little for the initial KL. A teacher in the process is loaded
    to be asked, one after the other; `init_kwargs` are for these. `top_k`: likeliest tokens that the run asks for."""
    from ..logprobs import architecture, check_logps, completion_logps

    asked = {branch: teacher for branch, teacher in teachers.items() if teacher not in tuple(OWN_TEACHERS)}
    if not asked:
        return []
    _say(f"loading the student, {student}, which writes {len(PROBE_CONVERSATIONS)} short answers")
    model = _load(student, source)
    pad = int(tokenizer.eos_token_id)

    try:
        check_logps(
            f"the student ({architecture(model)})",
            lambda ids, lens: completion_logps(model, ids, lens, pad)[0],
            model,
            model,
        )
    except ValueError as error:
        return [Finding("student", "log-probs", "error", str(error))]

    def own_logps(probe: Probe) -> list[Tensor]:
        with torch.no_grad():
            logps, _ = completion_logps(model, probe.token_ids, probe.prompt_lens, pad)
        lengths = [len(ids) - start for ids, start in zip(probe.token_ids, probe.prompt_lens, strict=True)]
        return [row[:length].float().cpu() for row, length in zip(logps, lengths, strict=True)]

    probe = Probe.of(tokenizer, max_tokens, model.generation_config.eos_token_id)
    own = model.generation_config.eos_token_id
    ends = sorted({pad, *([own] if isinstance(own, int) else own or ())})  # as a run has them
    written = _write(model, probe, max_tokens, pad, ends)
    unended = unended_turn(tokenizer, ends)
    said = unended or "what ends a turn of the chat template ends its completions"
    findings = [Finding("student", "end of sequence", "warning" if unended else "ok", said)]
    vocab_size = head_size(model)
    texts = ((probe, own_logps(probe)), (written, own_logps(written)))
    itself = []
    for branch, spec in asked.items():
        try:
            if not isinstance(spec, ServerTeacher):
                _say(f"loading teacher {branch!r}, {spec}, which is asked about them")
            teacher = spec if isinstance(spec, ServerTeacher) else _load_teacher(spec, branch, model, init_kwargs)
            itself += [branch] if is_student_start(teacher, student) else []
            findings += _ask(branch, teacher, tokenizer, vocab_size, texts, branch in itself, top_k)
        except (CaMOPDError, ValueError) as error:
            findings.append(Finding(branch, "in the process", "error", str(error)))
        except torch.OutOfMemoryError:
            text = "it does not fit onto the GPU beside the student. Serve it (camopd serve), or free the GPU"
            findings.append(Finding(branch, "in the process", "error", text))
    return [*findings, nothing_to_learn(itself)] if len(itself) == len(teachers) else findings


def _say(what: str) -> None:
    """A line before what takes a while, beside the table, which comes at the end and is all that goes to stdout."""
    pace = "" if torch.cuda.is_available() else ": a minute or more on a CPU"
    print("\n".join(wrapped(f"{what}{pace} ...")), file=sys.stderr, flush=True)


def _ask(
    branch: str, teacher: Any, tokenizer: Any, vocab_size: int, texts: Any, same: bool, top_k: int
) -> list[Finding]:
    """What a teacher says of the probe and of what the student has written, `texts`, each with the student's log-probs.
    `top_k`: its likeliest tokens that the run asks for."""
    from ..loss import need_tokens

    (probe, probe_logps), (written, written_logps) = texts
    if not isinstance(teacher, ServerTeacher):
        need_tokens(top_k, branch, teacher)
    most = max(LIKELIEST, top_k)
    found = list(check_scores(branch, teacher, tokenizer, vocab_size, probe, probe_logps, same, most))
    if any(finding.level == "error" for finding in found):
        return found
    try:
        theirs = torch.cat([row.logps for row in teacher.score(written.token_ids, written.prompt_lens)])
    except CaMOPDError as error:
        return [*found, Finding(branch, "initial KL", "error", str(error))]
    kl = (torch.cat(written_logps) - theirs).mean().item()
    return [*found, initial_kl(branch, kl, len(theirs))]


def _load_teacher(spec: str, branch: str, student: Any, init_kwargs: Any) -> Any:
    from ..teachers.local import LocalTeacher, load_teacher_model

    dtype = student.get_input_embeddings().weight.dtype
    model = load_teacher_model(spec, {"dtype": dtype, **init_kwargs}, branch)
    return LocalTeacher(model, spec, student.device, len(PROBE_CONVERSATIONS))


def _load(student: str, source: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return AutoModelForCausalLM.from_pretrained(student, **source).to(device).eval()
    except torch.OutOfMemoryError:
        raise CaMOPDError(
            f"the student {student!r} does not fit onto the GPU beside what runs there (the teachers, perhaps). Set "
            "CUDA_VISIBLE_DEVICES to a free GPU, or to nothing for the CPU."
        ) from None


def _write(model: Any, probe: Probe, max_tokens: int, pad: int, ends: list[int]) -> Probe:
    """The student's own short answers to the prompts of a probe."""
    from ..generation import neutral_generation

    written = Probe([], [])
    torch.manual_seed(0)
    for ids, start in zip(probe.token_ids, probe.prompt_lens, strict=True):
        room = min(48, max_tokens - start)
        prompt = torch.tensor([ids[:start]], device=model.device)
        with neutral_generation(model):
            output = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=True, top_k=0, max_new_tokens=room,
                pad_token_id=pad, eos_token_id=ends,
            )  # fmt: skip
        written.token_ids.append(output[0].tolist())
        written.prompt_lens.append(start)
    return written


def _stop_on_errors(findings: list[Finding]) -> None:
    if any(finding.level == "error" for finding in findings):
        _show(findings)
        raise SystemExit(2)


def _show(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("branch", "what", "", "found"):
        table.add_column(column, no_wrap=column != "found", overflow="fold")  # long URLs and paths stay whole
    style = {"ok": "green", "warning": "yellow", "error": "bold red"}
    branches = list(dict.fromkeys(finding.branch for finding in findings))
    for finding in sorted(findings, key=lambda finding: branches.index(finding.branch)):
        level = Text(finding.level, style[finding.level])
        table.add_row(Text(str(finding.branch)), finding.subject, level, Text(finding.text))
    Console().print(table)
