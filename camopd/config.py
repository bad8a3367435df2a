"""`CaMOPDConfig`: TRL's `DistillationConfig` plus what the paper adds, with the paper's values as defaults."""

import json
import os
from dataclasses import dataclass, field
from typing import Any

from trl import DistillationConfig

from . import setting_rules
from .best import settle_metric
from .learning_rate import settle_schedule
from .objective import IMPORTANCE_MODES, SCORE_KINDS
from .schedule import Schedule, by_step, value_at
from .token_rules import TOKEN_RULES


SCORE_TOKENS = 65536  # padded tokens of a no-gradient forward, which keeps nothing but its last hidden states
GAP_STUDENTS = ("trainer", "engine")
OPTIMIZER_MOMENTS = ("shared", "per_branch")
LOSS_NORMALIZATIONS = ("sample", "token")
BRANCH_WEIGHTS = ("none", "sigma")
PAPER_MASS_TARGET = {"general": 0.8, "domain": 0.8}
PAPER_SCALE = {"general": 2.0, "domain": 1.0}
PAPER_SCORE = {"general": "absolute", "domain": "positive"}


@dataclass
class CaMOPDConfig(DistillationConfig):
    r"""
    Configuration class for the [`CaMOPDTrainer`].

    Extends [`~trl.DistillationConfig`] with the fields of CaMOPD (https://arxiv.org/abs/2605.27115). A field that is
    said to be *per branch* takes one value for all branches, or a dict from branch name to value (in YAML a mapping, on
    the command line a JSON object).

    Parameters:
        > Parameters of the method

        schedule (`str`, *optional*, defaults to `"general:3,domain:1"`):
            Which branches each optimizer step takes, Eq. 5. `,` separates steps, `+` mixes branches inside a step,
            `name:n` is a number of steps or a share. See [`~camopd.Schedule`].
        mass_target (`float` or `dict[str, float]`, *optional*, defaults to `0.8` for both branches):
            rho_b of Eq. 8, per branch: share of the total gap score that the selected samples hold, in (0, 1].
        scale (`float` or `dict[str, float]`, *optional*, defaults to `2.0` for `general` and `1.0` for `domain`):
            r_b of Eq. 9, per branch: factor on the advantage.
        score (`str` or `dict[str, str]`, *optional*, defaults to `"absolute"` for `general` and `"positive"` for `domain`):
            How a sample's gap is scored, per branch: `"absolute"` is Eq. 6, `"positive"` is Eq. 7.
        selection (`bool` or `dict[str, bool]`, *optional*, defaults to `True`):
            Whether to select samples by Eq. 8, per branch. `False` trains on every sample ("w/o sel").
        importance_sampling_mode (`str`, *optional*, defaults to `"mask"`):
            w_t of Eq. 2 and 9, the ratio of trainer to rollout engine on each token: `"mask"` sets it to 0 outside the
            band, `"truncate"` clamps it to the band, `"none"` uses 1. Without rollout log-probs it is 1.
        importance_sampling_low (`float`, *optional*, defaults to `0.5`):
            Lower bound of the band, inclusive. The paper gives no band; [0.5, 2.0] is that of Nemotron-Cascade 2
            (https://arxiv.org/abs/2603.19220), the one report that publishes it for this loss.
        importance_sampling_high (`float`, *optional*, defaults to `2.0`):
            Upper bound of the band, inclusive.
        num_iterations (`int`, *optional*, defaults to `1`):
            Optimizer updates per rollout. Algorithm 1 makes exactly one and defines no ratio clip for more.

        exchange (`bool`, *optional*, defaults to `True`):
            Whether kept samples are spread anew over the ranks, balanced by tokens. Without, every rank trains those it has
            rolled out, with the same loss and gradient, and waits for the fullest one.
        padding_free (`bool`, *optional*):
            Whether samples of a forward stand one after the other without padding. The numbers are the same. By default
            where the student's attention implementation gains from it: flash attention (`attn_implementation:
            flash_attention_2`) and `flex_attention`. Others, `sdpa` and `eager`, would mask a square of all tokens instead.
        max_tokens_per_micro_batch (`int`, *optional*):
            Tokens of one forward and backward of the student, padding included; as many samples share it as it holds. At
            least one longest sample, max_prompt_length + max_completion_length. By default there are as many micro-batches
            as `per_device_train_batch_size` samples in each would make.
        gap_student (`str`, *optional*, defaults to `"trainer"`):
            Whose log-probs the student's side of the gap has at selection: `"trainer"` computes them in a forward of
            its own, `"engine"` takes those of the rollout engine (vLLM or transformers) and saves that forward.
            `importance/log_ratio` says how far the two are from each other.
        loss_prefix_tokens (`int`, *optional*):
            Score and train only the first so many tokens of each completion. By default all.
        optimizer_moments (`str`, *optional*, defaults to `"shared"`):
            `"per_branch"` gives each branch a first moment of its own (experimental): Adam's shared one mixes the branches
            again that the schedule separates. The second moment stays shared. `update/cosine` shows the difference.
        diagnostics_steps (`int`, *optional*, defaults to `10`):
            Measure how coherent the samples' gradients are in the first step of each branch in every so many optimizer
            steps, and how the branches' gradients lie to each other in every step; `0` measures neither. Training is the
            same with and without. See docs/metrics.md for what it costs and what it can show.

        > Parameters of the baselines (see docs/methods.md; `configs/methods` has a file for each)

        token_rule (`str`, *optional*, defaults to `"none"`):
            Which sampled tokens the loss counts, and how much: `"relaxed_opd"` is Relaxed OPD
            (https://arxiv.org/abs/2603.11137), `"selectkd"` is SelecTKD (https://arxiv.org/abs/2510.24021).
            The second costs a forward of the student and, where the teacher is in the process, one of the teacher; a
            server is asked for its five likeliest tokens.
        relaxed_mixture (`float`, *optional*, defaults to `0.3`):
            lambda of Relaxed OPD, in (0, 1): rewards below log(lambda / (1 - lambda)) nats are raised to it.
        relaxed_entropy_share (`float`, *optional*, defaults to `0.2`):
            beta of Relaxed OPD, in (0, 1]: share of the step's tokens, those of highest entropy, that are trained.
        relaxed_exploration_steps (`int`, *optional*, defaults to `0`):
            Optimizer steps at the start that instead train the tokens whose reward is not below that floor.
        selectkd_reject_weight (`float`, *optional*, defaults to `0.01`):
            beta of SelecTKD, in [0, 1): weight of a token at which the student's likeliest token is none of the teacher's
            five likeliest. `0` leaves it out.
        loss_normalization (`str`, *optional*, defaults to `"sample"`):
            `"sample"` is Eq. 9: a mean over each sample's tokens, then over samples. `"token"` is one mean over all tokens
            of the kept samples; with Relaxed OPD over those that it trains.
        branch_weights (`str`, *optional*, defaults to `"none"`):
            `"sigma"` is DN-MOPD (https://arxiv.org/abs/2609.35347): in a step that mixes branches, the advantages of each
            are multiplied by the spread of all gaps over the spread of its own, clipped to [0.25, 4].

        > Parameters of the data

        prompts_per_step (`int`, *optional*, defaults to `512`):
            Prompts of one optimizer step over all ranks, before selection. `gradient_accumulation_steps` follows from
            it: prompts_per_step / (world size x per_device_train_batch_size).
        max_completion_length (`int` or `dict[int, int]`, *optional*, defaults to `32768`):
            Tokens a completion may have, or a schedule of it over optimizer steps, counted from 0: `{0: 2048, 40: 8192}` is
            8192 from step 40 on. Evaluation always uses the largest.
        completion_lengths (`dict[int, int]`, *optional*):
            Derived: the schedule that `max_completion_length` was given. A copy of the config with another
            `max_completion_length` drops it.
        max_prompt_length (`int`, *optional*, defaults to `4096`):
            Tokens a prompt may have. Longer ones keep their *last* tokens, so that the generation prompt survives.

        > Parameters of the teachers

        teachers (`dict[str, Any]`, *optional*):
            Teacher of each branch: URL of a vLLM server or a list of URLs (replicas), `{"urls": ..., "model": ...}` to
            have the served model checked, a model id or path (in-process), `"adapter_off"` (a LoRA student without its
            adapter), or `"adapter_start"` (with its adapter as it was before training). The trainer's own
            `teachers` argument wins over it.
        score_batch_size (`int`, *optional*):
            Size of a no-gradient forward, for the gaps and for in-process teachers: it holds as many tokens as so many of
            the longest sequences. By default 65536 tokens at the longest prompt and completion, and at least one sequence.
        teacher_patience (`float`, *optional*, defaults to `900.0`):
            Seconds to wait when every replica of a teacher is gone. After that the step's rollouts are saved with a
            checkpoint and training stops.

    > [!NOTE]
    > These parameters have default values different from [`~trl.DistillationConfig`], after the paper's Appendix A.7:
    > `max_steps=120`, `learning_rate=2e-6`, `lr_scheduler_type="constant"`, `max_completion_length=32768`; and ours where
    > it says nothing: `per_device_train_batch_size=1`, `disable_dropout=True`, `logging_steps=1`, no
    > `num_train_epochs`.
    > `gradient_accumulation_steps` is derived. With `warmup_steps`, `constant` is `constant_with_warmup`, whose first step
    > has a learning rate of 0.
    """

    _VALID_DICT_FIELDS = [  # noqa: RUF012 - as the parent declares it
        *DistillationConfig._VALID_DICT_FIELDS, "mass_target", "scale", "score", "selection", "teachers",
        "max_completion_length",
    ]  # fmt: skip

    # Parameters whose default values are overridden
    max_steps: int = field(
        default=120, metadata={"help": "Number of optimizer steps. The paper trains for 120 steps (Appendix A.7)."}
    )
    num_train_epochs: float = field(  # of the parent 3, which a user may write as well, in vain
        default=-1.0, metadata={"help": "Refused: with a stream per branch there is no epoch to count. Set max_steps."}
    )
    learning_rate: float = field(default=2e-6, metadata={"help": "The initial learning rate for AdamW."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "The learning rate scheduler to use."})
    max_completion_length: int | str | dict[Any, Any] | None = field(  # type: ignore[assignment]
        default=32768,
        metadata={"help": 'Maximum tokens of a completion, or a schedule: \'{"0": 2048, "40": 8192}\'.'},
    )
    per_device_train_batch_size: int = field(
        default=1, metadata={"help": "Sequences per device in one forward and backward of the student."}
    )
    gradient_accumulation_steps: int | None = field(
        default=None,
        metadata={"help": "Derived: prompts_per_step / (world size x per_device_train_batch_size). Leave it out."},
    )
    disable_dropout: bool = field(
        default=True,
        metadata={"help": "Whether to disable dropout in the student, so that gaps measure models and not noise."},
    )
    logging_steps: float = field(default=1, metadata={"help": "Log every X updates steps."})

    # Parameters of the method
    schedule: str = field(
        default="general:3,domain:1",
        metadata={"help": "Branches of each optimizer step (Eq. 5): ',' separates steps, '+' mixes inside a step."},
    )
    mass_target: dict[str, Any] | str | None = field(
        default_factory=lambda: dict(PAPER_MASS_TARGET),
        metadata={"help": "rho_b of Eq. 8, per branch: share of the gap score the selected samples hold, in (0, 1]."},
    )
    scale: dict[str, Any] | str | None = field(
        default_factory=lambda: dict(PAPER_SCALE),
        metadata={"help": "r_b of Eq. 9, per branch: factor on the advantage."},
    )
    score: dict[str, Any] | str | None = field(
        default_factory=lambda: dict(PAPER_SCORE),
        metadata={"help": "Score of a sample's gap, per branch: 'absolute' (Eq. 6) or 'positive' (Eq. 7)."},
    )
    selection: dict[str, Any] | str | None = field(
        default_factory=lambda: {"general": True, "domain": True},
        metadata={"help": "Whether to select samples by Eq. 8, per branch. False trains on every sample."},
    )
    importance_sampling_mode: str = field(
        default="mask",
        metadata={"help": "w_t of Eq. 2 and 9 outside its band: 'mask' (0), 'truncate' (clamp), or 'none' (w_t = 1)."},
    )
    importance_sampling_low: float = field(
        default=0.5, metadata={"help": "Lower bound of pi_train / pi_rollout, inclusive."}
    )
    importance_sampling_high: float = field(
        default=2.0, metadata={"help": "Upper bound of pi_train / pi_rollout, inclusive."}
    )
    num_iterations: int = field(
        default=1, metadata={"help": "Optimizer updates per rollout; Algorithm 1 makes exactly one."}
    )

    exchange: bool = field(
        default=True,
        metadata={"help": "Whether kept samples are spread anew over the ranks, balanced by tokens."},
    )

    padding_free: bool | None = field(
        default=None,
        metadata={
            "help": "Forward samples without padding; default where the attention implementation gains from it."
        },
    )
    max_tokens_per_micro_batch: int | None = field(
        default=None, metadata={"help": "Tokens of one forward and backward, padding included; at least one sample."}
    )
    gap_student: str = field(
        default="trainer",
        metadata={"help": "Student's log-probs at selection: of the 'trainer' (one more forward) or the 'engine'."},
    )
    loss_prefix_tokens: int | None = field(
        default=None, metadata={"help": "Score and train only the first so many tokens of each completion."}
    )
    optimizer_moments: str = field(
        default="shared",
        metadata={"help": "Adam's first moment: 'shared', or 'per_branch' (experimental)."},
    )
    diagnostics_steps: int = field(
        default=10, metadata={"help": "Measure gradients once per branch in every X optimizer steps; 0 is never."}
    )

    # Parameters of the baselines
    token_rule: str = field(
        default="none",
        metadata={"help": "Which sampled tokens the loss counts: 'none' (all alike), 'relaxed_opd' or 'selectkd'."},
    )
    relaxed_mixture: float = field(
        default=0.3, metadata={"help": "lambda of Relaxed OPD: rewards are not below log(lambda / (1 - lambda))."}
    )
    relaxed_entropy_share: float = field(
        default=0.2, metadata={"help": "beta of Relaxed OPD: share of tokens, of highest entropy, that are trained."}
    )
    relaxed_exploration_steps: int = field(
        default=0,
        metadata={"help": "First steps of Relaxed OPD that train the tokens above its reward floor instead."},
    )
    selectkd_reject_weight: float = field(
        default=0.01, metadata={"help": "beta of SelecTKD: weight of tokens that the teacher does not accept."}
    )
    loss_normalization: str = field(
        default="sample", metadata={"help": "Mean per 'sample' and then over samples (Eq. 9), or over every 'token'."}
    )
    branch_weights: str = field(
        default="none",
        metadata={"help": "'sigma' (DN-MOPD) brings the gaps of the branches of a mixed step to one spread."},
    )

    completion_lengths: dict[Any, Any] | str | None = field(
        default=None, metadata={"help": "Derived from max_completion_length. Leave it out."}
    )

    # Parameters of the data
    prompts_per_step: int = field(
        default=512, metadata={"help": "Prompts of one optimizer step over all ranks, before selection."}
    )
    max_prompt_length: int = field(
        default=4096, metadata={"help": "Tokens a prompt may have; longer ones keep their last tokens."}
    )

    # Parameters of the teachers
    teachers: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Teacher of each branch: vLLM URL or list of URLs, model id or path, 'adapter_off', 'adapter_start'. "
            "The trainer's `teachers` argument wins."
        },
    )
    score_batch_size: int | None = field(
        default=None,
        metadata={"help": "Sequences per no-gradient forward, for gaps and in-process teachers; default by tokens."},
    )
    teacher_patience: float = field(
        default=900.0,
        metadata={"help": "Seconds to wait when every replica of a teacher is gone, before training stops."},
    )

    def __post_init__(self):
        longest = self._read_completion_length()
        if self.score_batch_size is None and isinstance(self.max_prompt_length, int) and self.max_prompt_length > 0:
            self.score_batch_size = max(1, SCORE_TOKENS // (self.max_prompt_length + longest))
        # Before the parent's checks, which hand gradient_accumulation_steps to DeepSpeed.
        for name in (
            "prompts_per_step",
            "per_device_train_batch_size",
            "max_prompt_length",
            "score_batch_size",
            "max_steps",
            "max_tokens_per_micro_batch",
            "loss_prefix_tokens",
        ):
            value = getattr(self, name)
            if value is None and name in ("max_tokens_per_micro_batch", "loss_prefix_tokens"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.{_WHY.get(name, '')}")
        every: Any = self.diagnostics_steps
        if not isinstance(every, int) or isinstance(every, bool) or every < 0:
            raise ValueError(
                f"diagnostics_steps must be a whole number of at least 1, or 0 to measure nothing, got {every!r}."
            )
        for name in ("mass_target", "scale", "score", "selection", "teachers"):
            value = getattr(self, name)
            if isinstance(value, str) and value.lstrip().startswith("{"):
                try:
                    json.loads(value)
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f"{name} is no valid JSON: {value} ({error}). Names and texts need double quotes: "
                        f'--{name} \'{{"general": ..., "domain": ...}}\'.'
                    ) from None
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self._derive_accumulation(world_size)
        settle_metric(self, Schedule.parse(self.schedule).branches)  # before the parent, which has another direction
        super().__post_init__()
        settle_schedule(self)
        if self.world_size != world_size:  # a launcher that does not set WORLD_SIZE
            self.gradient_accumulation_steps = None
            self._derive_accumulation(self.world_size)

        schedule = Schedule.parse(self.schedule)
        for step in range(schedule.period):
            for branch, rows in schedule.rows(step, self.prompts_per_step).items():
                if rows == 0:
                    raise ValueError(
                        f"schedule {self.schedule!r} gives branch {branch!r} none of the {self.prompts_per_step} prompts "
                        f"of step {step}. Raise prompts_per_step or the branch's share."
                    )
        if str(self.resume_from_checkpoint).lower() in ("true", "false"):  # on the command line
            self.resume_from_checkpoint: Any = str(self.resume_from_checkpoint).lower() == "true"
        if self.use_vllm and self.vllm_mode == "colocate" and self.vllm_max_model_length is None:
            # Else vLLM wants room for the longest sequence that the model can take.
            self.vllm_max_model_length = self.max_prompt_length + longest
        self._check_method(schedule)
        self._check_refused()
        setting_rules.warn(setting_rules.without_effect(self), self)

    def _read_completion_length(self) -> int:
        """Leave the largest length where the parent looks for a number, and the schedule in `completion_lengths`."""
        name = "max_completion_length"
        given: Any = self.max_completion_length
        if isinstance(given, str) and given.lstrip().startswith("{"):
            try:
                given = json.loads(given)
            except json.JSONDecodeError as error:
                raise ValueError(f"{name} is no valid JSON: {given} ({error}).") from None
        steps = by_step(name, given)
        if self.completion_lengths is not None and not isinstance(given, dict):
            known = by_step(name, self.completion_lengths)  # of a config that is copied
            if len(steps) == 1 and max(known.values()) == max(steps.values()):
                steps = known
            elif given == CaMOPDConfig.max_completion_length:
                raise ValueError(
                    f"completion_lengths={self.completion_lengths!r} is derived; give the schedule as {name}."
                )
        if isinstance(self.max_steps, int) and 0 < self.max_steps <= max(steps):
            raise ValueError(
                f"{name} changes at step {max(steps)}, but the run ends after max_steps={self.max_steps} steps (0 to "
                f"{self.max_steps - 1}). Raise max_steps, or leave that entry out."
            )
        self.max_completion_length = max(steps.values())
        self.completion_lengths = steps if len(steps) > 1 else None
        return self.longest_completion

    @property
    def longest_completion(self) -> int:
        """Tokens a completion may have in any step: what memory and servers must allow for."""
        assert isinstance(self.max_completion_length, int)  # since __post_init__
        return self.max_completion_length

    def completion_length_at(self, step: int) -> int:
        """Tokens a completion may have in an optimizer step, counted from 0."""
        return value_at(by_step("max_completion_length", self.completion_lengths or self.max_completion_length), step)

    def per_branch(self, name: str) -> dict[str, Any]:
        """Value of a per-branch field for each branch of the schedule; one value stands for all."""
        branches = Schedule.parse(self.schedule).branches
        value = getattr(self, name)
        if not isinstance(value, dict):
            return dict.fromkeys(branches, value)
        unknown = set(value) - set(branches) - {"general", "domain"}  # those two are in the defaults
        if unknown:
            raise ValueError(
                f"{name} has a value for {sorted(unknown)}, but the branches of schedule {self.schedule!r} are "
                f"{list(branches)}. Mend the name, or add the branch to the schedule."
            )
        missing = [branch for branch in branches if branch not in value]
        if missing:
            raise ValueError(
                f"{name} has no value for branch {missing[0]!r} of schedule {self.schedule!r}, only for "
                f"{sorted(value)}. Add it, or give one value for all branches."
            )
        return {branch: value[branch] for branch in branches}

    def _derive_accumulation(self, world_size: int) -> None:
        per_pass = world_size * self.per_device_train_batch_size
        if self.prompts_per_step % per_pass:
            below = self.prompts_per_step - self.prompts_per_step % per_pass
            wanted = f"{below} or {below + per_pass}" if below else f"{per_pass}"
            raise ValueError(
                f"prompts_per_step={self.prompts_per_step} does not divide into passes of {world_size} ranks x "
                f"per_device_train_batch_size={self.per_device_train_batch_size} = {per_pass} sequences: "
                f"{self.prompts_per_step} / {per_pass} = {self.prompts_per_step / per_pass:.3f}. Set prompts_per_step to "
                f"{wanted}, or change per_device_train_batch_size or the number of ranks."
            )
        derived = self.prompts_per_step // per_pass
        if self.gradient_accumulation_steps not in (None, derived):
            raise ValueError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} contradicts "
                f"prompts_per_step={self.prompts_per_step}, which makes it {self.prompts_per_step} / ({world_size} ranks x "
                f"{self.per_device_train_batch_size}) = {derived}. Leave it out, or set prompts_per_step to "
                f"{max(1, self.gradient_accumulation_steps) * per_pass}."
            )
        self.gradient_accumulation_steps = derived

    def _check_method(self, schedule: Schedule) -> None:
        for name, parse, allowed in (
            ("mass_target", float, lambda value: 0 < value <= 1),
            ("scale", float, lambda value: 0 < value < float("inf")),
            ("score", str, lambda value: value in SCORE_KINDS),
            ("selection", _to_bool, lambda value: True),
        ):
            value = getattr(self, name)
            if isinstance(value, dict):
                parsed: Any = {branch: _parse(f"{name}[{branch!r}]", item, parse) for branch, item in value.items()}
            else:
                parsed = _parse(name, value, parse)
            setattr(self, name, parsed)
            for branch, item in self.per_branch(name).items():
                if not allowed(item):
                    raise ValueError(f"{name} of branch {branch!r} is {item!r}; {_WHY[name]}")
        if self.importance_sampling_mode not in IMPORTANCE_MODES:
            raise ValueError(
                f"importance_sampling_mode must be one of {IMPORTANCE_MODES}, got {self.importance_sampling_mode!r}."
            )
        for name, choices in (
            ("gap_student", GAP_STUDENTS),
            ("optimizer_moments", OPTIMIZER_MOMENTS),
            ("token_rule", TOKEN_RULES),
            ("loss_normalization", LOSS_NORMALIZATIONS),
            ("branch_weights", BRANCH_WEIGHTS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}.")
        optim = str(getattr(self.optim, "value", self.optim))
        if optim in ("lomo", "adalomo"):
            raise ValueError(
                f"optim={optim!r} changes the weights in the backward of every micro-batch, but a rollout is for one "
                "update of them all (Eq. 9). Leave optim out, or take adamw_torch_8bit to save memory (docs/scale.md)."
            )
        plain = ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused")
        if self.optim_args and (optim in (*plain, "adafactor") or self.optimizer_moments == "per_branch"):
            raise ValueError(
                f"optim_args={self.optim_args!r} would be ignored: optim={optim!r} takes none. Leave it out."
            )
        if self.optimizer_moments == "per_branch" and optim not in plain:
            raise ValueError(
                f"optimizer_moments='per_branch' is an AdamW of its own and cannot be optim={optim!r}. Leave optim out."
            )
        self._check_baselines(schedule)
        self._check_budget()
        if not 0 <= self.importance_sampling_low <= 1 <= self.importance_sampling_high:
            raise ValueError(
                f"importance_sampling_low={self.importance_sampling_low} and "
                f"importance_sampling_high={self.importance_sampling_high} must enclose 1, the ratio of two engines that "
                "agree: 0 <= low <= 1 <= high. The default band is 0.5 to 2.0."
            )
        if not self.teacher_patience > 0:
            raise ValueError(f"teacher_patience must be a positive number of seconds, got {self.teacher_patience!r}.")
        slowest = (
            self.teacher_patience + 2 * 300
        )  # the two time-outs of teachers/server.py that may lie around the wait
        if self.world_size > 1 and slowest > self.ddp_timeout:
            raise ValueError(
                f"teacher_patience={self.teacher_patience:g} and two time-outs of 300 seconds come to {slowest:g}, more "
                f"than ddp_timeout={self.ddp_timeout}: a rank that waits for its teacher would be taken for dead. "
                "Raise ddp_timeout or lower teacher_patience."
            )
        if self.teachers is not None and not isinstance(self.teachers, dict):
            raise ValueError(
                f"teachers must map each branch to its teacher, got {self.teachers!r}. Write "
                f"{json.dumps(dict.fromkeys(schedule.branches, '...'))}."
            )

    def _check_baselines(self, schedule: Schedule) -> None:
        for name, allowed, reason in (
            (
                "relaxed_mixture",
                0 < self.relaxed_mixture < 1,
                "lambda of Relaxed OPD lies between 0 and 1, without them",
            ),
            (
                "relaxed_entropy_share",
                0 < self.relaxed_entropy_share <= 1,
                "it is a share of the tokens and lies in (0, 1]. 1 leaves the choice by entropy out",
            ),
            (
                "selectkd_reject_weight",
                0 <= self.selectkd_reject_weight < 1,
                "a rejected token weighs less than an accepted one, so it lies in [0, 1). For a weight of 1 on every "
                "token, set token_rule to 'none'",
            ),
        ):
            if not allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; {reason}.")
        steps = self.relaxed_exploration_steps
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
            raise ValueError(f"relaxed_exploration_steps must be a whole number of at least 0, got {steps!r}.")
        if self.branch_weights == "sigma" and all(len(shares) == 1 for shares in schedule.steps):
            raise ValueError(
                f"branch_weights='sigma' compares the branches inside a step, but no step of schedule {self.schedule!r} "
                "mixes any: every weight would be 1. Mix them ('general:1+domain:1'), or leave branch_weights out and set "
                "scale."
            )

    def _check_budget(self) -> None:
        budget = self.max_tokens_per_micro_batch
        if budget is None:
            return
        longest = self.max_prompt_length + self.longest_completion
        if budget < longest:
            raise ValueError(
                f"max_tokens_per_micro_batch={budget} is smaller than one sample: max_prompt_length + "
                f"max_completion_length = {self.max_prompt_length} + {self.longest_completion} = {longest}. Raise it to "
                f"{longest} or lower the lengths."
            )
        if self.per_device_train_batch_size != 1:
            raise ValueError(
                f"max_tokens_per_micro_batch={budget} decides how many samples share a micro-batch, and so would "
                f"per_device_train_batch_size={self.per_device_train_batch_size}. Leave the second at 1."
            )

    def _check_refused(self) -> None:
        """Refuse what the parent offers and the method cannot use, instead of ignoring it."""
        token: Any = self.hub_token
        if token == "<HUB_TOKEN>":  # as `to_dict` writes every token, set or not
            self.hub_token: Any = None
        elif token is not None:
            raise ValueError(
                "hub_token would be stored in training_args.bin, which lies beside the model and is sent to the Hub. Leave "
                "it out, and set HF_TOKEN or run `hf auth login`."
            )
        for name, off, also_off in (("top_k", 0, -1), ("min_p", None, 0.0)):  # two ways to say it
            if getattr(self, name) == also_off:
                setattr(self, name, off)
        setting_rules.refuse(self)
        self._check_generation_kwargs()

    def _check_generation_kwargs(self) -> None:
        given: dict[str, Any] = dict(self.generation_kwargs or {})  # type: ignore[arg-type]  # a dict since __post_init__
        harmless = _VLLM_KWARGS if self.use_vllm else set(_TRANSFORMERS_KWARGS)
        engine = "vLLM" if self.use_vllm else "transformers"
        elsewhere = {*_VLLM_KWARGS, *_TRANSFORMERS_KWARGS, *_NOT_FOR_VLLM, "stop_strings", "cache_config"}
        of_the_other = sorted(set(given) & elsewhere - harmless)
        clash = sorted(set(given) - elsewhere)
        if clash:
            raise ValueError(
                f"generation_kwargs sets {clash}, which CaMOPD cannot use: {setting_rules.ON_POLICY}. What may be set is "
                f"{sorted(harmless)}."
            )
        if of_the_other:
            reasons = [
                f"{name}: {_NOT_FOR_VLLM[name]}" for name in of_the_other if self.use_vllm and name in _NOT_FOR_VLLM
            ]
            raise ValueError(
                f"generation_kwargs sets {of_the_other}, which generation by {engine} (use_vllm={self.use_vllm}) would "
                f"ignore or stop at{' (' + '; '.join(reasons) + ')' if reasons else ''}. Leave it out; what may be set is "
                f"{sorted(harmless)}."
            )
        for name, value in {"cache_implementation": self.cache_implementation, **given}.items():
            check = _TRANSFORMERS_KWARGS.get(name)
            if check is not None and not self.use_vllm and value is not None and not check[0](value):
                raise ValueError(f"{name} is {value!r}, which CaMOPD cannot use: {check[1]}.")


# What neither bends the sampled distribution nor the number of completions per prompt, of vLLM's SamplingParams.
_VLLM_KWARGS = {"stop_token_ids"}
_NOT_FOR_VLLM = {
    "seed": "with it equal prompts get one and the same completion",
    "stop": "a completion that ends so counts as cut off, and would teach the student not to end. Use stop_token_ids",
    "include_stop_str_in_output": "there is no `stop` for it",
}
# The same for generation by transformers: which values may be set, and why no others.
_TRANSFORMERS_KWARGS: dict[str, tuple[Any, str]] = {
    "use_cache": (lambda value: isinstance(value, bool), "it is true or false"),
    "cache_implementation": (
        lambda value: value not in ("quantized", "paged"),
        "a quantized cache draws from another distribution than that of the model, and a paged one is not used here. "
        "Leave it out, or take 'dynamic', 'offloaded', 'static' or 'offloaded_static'",
    ),
    "prefill_chunk_size": (lambda value: isinstance(value, int) and value >= 1, "it is a number of tokens"),
    "max_time": (lambda value: isinstance(value, int | float) and value > 0, "it is a number of seconds"),
}
_WHY = {
    "max_steps": " With one stream per branch there is no epoch to count; say how many optimizer steps to make.",
    "mass_target": "it is a share of the total score (Eq. 8) and lies in (0, 1]. To train on every sample, set "
    "selection to False.",
    "scale": "r_b of Eq. 9 must be a positive number. To leave a branch out, take it out of the schedule.",
    "score": f"it must be one of {SCORE_KINDS}: Eq. 6 or Eq. 7.",
}


def _parse(name: str, value: Any, parse: Any) -> Any:
    try:
        if parse is float and isinstance(value, bool):
            raise ValueError
        return parse(value)
    except (TypeError, ValueError):
        raise ValueError(
            f"{name} must be {'a number' if parse is float else 'true or false'} or a mapping from branch to that, "
            f"got {value!r}."
        ) from None


def _to_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise ValueError(value)
