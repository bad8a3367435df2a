"""`CaMOPDConfig`: TRL's `DistillationConfig` plus what the paper adds, with the paper's values as defaults."""

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.utils import is_torch_xla_available
from trl import DistillationConfig
from trl.trainer.utils import get_config_model_id

from . import late_settings, method_rules, setting_rules
from .best import settle_metric
from .generation import check_generation_kwargs
from .learning_rate import settle_schedule
from .schedule import Schedule, by_step, value_at


PAPER_MASS_TARGET = {"general": 0.8, "domain": 0.8}
PAPER_SCALE = {"general": 2.0, "domain": 1.0}
PAPER_SCORE = {"general": "absolute", "domain": "positive"}


@dataclass
class CaMOPDConfig(DistillationConfig):
    r"""
    Configuration class for the [`CaMOPDTrainer`].

    Extends [`~trl.DistillationConfig`] with the fields of CaMOPD (https://arxiv.org/abs/2605.27115). A field that is
    said to be *per branch* takes one value for all branches, or a dict from branch name to value (in YAML a mapping, on
    the command line a JSON object). A branch without a value gets the paper's, one of another name than `general` and
    `domain` those of `method_rules.OF_A_NEW_BRANCH`; a line says which.

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
        selection (`bool`, `str` or `dict`, *optional*, defaults to `True`):
            Whether to select samples by Eq. 8, per branch. `False` trains on every sample ("w/o sel"); `"random"` and
            `"smallest"` are controls that keep as many as Eq. 8 would, drawn at random or with the smallest scores.
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

        rebalance (`bool`, *optional*, defaults to `True`):
            Whether kept samples are rebalanced across ranks by tokens. Without, every rank trains those it has rolled
            out, with the same loss and gradient, and waits for the fullest one.
        padding_free (`bool`, *optional*):
            Whether samples of a forward stand one after the other without padding. The numbers are the same. By default
            where the student's attention implementation gains from it: flash attention (`attn_implementation:
            flash_attention_2`) and `flex_attention`. Others, `sdpa` and `eager`, mask a square of all tokens instead: with
            `sdpa` on a machine without an accelerator, short batches go without padding where that is less work.
        max_tokens_per_micro_batch (`int`, *optional*):
            Tokens of one forward and backward of the student, padding included; as many samples share it as it holds. At
            least one longest sample, max_prompt_length + max_completion_length. By default there are as many micro-batches
            as `per_device_train_batch_size` samples in each would make.
        student_logps (`str`, *optional*, defaults to `"trainer"`):
            Source of the student log-probs used for scoring at selection: `"trainer"` computes them in a forward of
            its own, `"engine"` takes those of the rollout engine (vLLM or transformers) and saves that forward, `"auto"`
            does so where `importance/log_ratio`, their distance, has been small against the gaps (docs/scale.md).
        loss_prefix_tokens (`int`, *optional*):
            Score and train only the first so many tokens of each completion. By default all.
        optimizer_moments (`str`, *optional*, defaults to `"shared"`):
            `"per_branch"` gives each branch a first moment of its own (experimental): Adam's shared one mixes the branches
            again that the schedule separates. The second moment stays shared. `update/cosine` shows the difference.
        verbose (`bool`, *optional*, defaults to `False`):
            Print transformers' dictionaries in place of a line per step.
        diagnostics_steps (`int`, *optional*, defaults to `10`):
            Measure how coherent the samples' gradients are once per branch every N optimizer
            steps, and how the branches' gradients lie to each other in every step; `0` measures neither. Training is the
            same with and without. See docs/metrics.md for what it costs and what it can show.

        guards (`dict[str, float | None]`, *optional*):
            Thresholds of the guards on a run's numbers by name, over the defaults; `None` switches one off (metrics.md).
        eval_tasks (`list[str]`, *optional*):
            Tasks of lm-eval that each evaluation measures beside the held-out prompts: names, or paths of YAML files. See
            docs/evaluation.md.
        eval_tasks_items (`int`, *optional*, defaults to `64`):
            Rows of each of `eval_tasks`, drawn once.

        > Parameters of the baselines (see docs/methods.md; `camopd/methods` has a file for each)

        token_rule (`str`, *optional*, defaults to `"none"`):
            Which sampled tokens the loss counts, and how much: `"relaxed_opd"` is Relaxed OPD
            (https://arxiv.org/abs/2603.11137), `"selectkd"` is SelecTKD (https://arxiv.org/abs/2510.24021), and
            `"teacher_free"` is a control. SelecTKD costs a forward of the student and, in the process, of the teacher; a
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
        divergence (`str`, *optional*, defaults to `"sampled"`):
            `"full"` has the exact reverse KL at each token in place of Eq. 1's sample of it, `"top_k"` that over the
            `divergence_top_k` tokens likeliest to the teacher and all others as one.
        divergence_top_k (`int`, *optional*, defaults to `20`):
            How many; `camopd serve` starts servers that give 20.
        baseline (`str`, *optional*, defaults to `"none"`):
            `"kl"` adds the exact reverse KL at each token to Eq. 1 as a constant, which takes noise out of the gradient.

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
        split_special_tokens (`bool`, *optional*, defaults to `False`):
            Encode special tokens in the text of prompts (`<|im_end|>`) as text. Else they are control tokens.
        prefill (`bool`, *optional*, defaults to `False`):
            Have the student go on with a prompt that ends with an assistant turn, which is refused otherwise.
        trust_checkpoint (`bool`, *optional*, defaults to `False`):
            Let DeepSpeed and FSDP, which unpickle, go on from a checkpoint outside `output_dir`.

        rollout_servers (`list[str]`, *optional*):
            URLs of vLLM servers that write the rollouts and get the student's weights each step (`camopd serve --student`).
            A rank asks for its own prompts. In place of `use_vllm`; see docs/scale.md.
        rollout_lag (`int`, *optional*, defaults to `0`):
            `1`: `rollout_servers` write a step's completions, by the weights of before, while the step before trains.

        > Parameters of the teachers

        teachers (`dict[str, Any]`, *optional*):
            Teacher of each branch: URL of a vLLM server or a list of URLs (replicas), `{"urls": ..., "model": ...}` to
            have the served model checked, a model id or path (in-process), `"adapter_off"` (a LoRA student without its
            adapter), `"adapter_start"` (with its adapter as it was before training), or `"self"` (the student as it is,
            after a `teacher_prompt`). The trainer's own `teachers` argument wins over it.
        teacher_prompt (`dict[str, str | list[dict[str, str]]]`, *optional*):
            What the teacher of a branch sees in place of the prompt, per branch: a text with `{prompt}` for the last user
            message, or messages that end with one that has it. Prompts may bring a column of this name in its place. Not
            cut: `max_prompt_length` must hold it. See docs/context.md.
        score_tokens (`int`, *optional*, defaults to `65536`):
            Size of a forward without gradient, for the gaps and for in-process teachers: as many sequences share one as
            `score_tokens` holds of the longest prompt and completion, and at least one.
        teacher_timeout (`float`, *optional*, defaults to `900.0`):
            Seconds to wait when every replica of a teacher, or every rollout server, is gone. After that a checkpoint is
            saved, with the rollouts that are scored, and training stops.

        > Parameters of the run's folder

        overwrite_output_dir (`bool`, *optional*, defaults to `False`):
            Whether a new run may begin in an `output_dir` with the files of another one, which is refused otherwise: its
            checkpoints and `rejected/` go, its `metrics.jsonl` is renamed. To go on, `resume_from_checkpoint="auto"`.

        > Old names of settings, accepted with a warning for one release

        gap_student (`str`, *optional*):
            Old name of `student_logps`.
        exchange (`bool`, *optional*):
            Old name of `rebalance`.
        teacher_patience (`float`, *optional*):
            Old name of `teacher_timeout`.
        score_batch_size (`int`, *optional*):
            Old form of `score_tokens`: how many of the longest sequences.

    > [!NOTE]
    > These parameters have default values different from [`~trl.DistillationConfig`], after the paper's Appendix A.7:
    > `max_steps=120`, `learning_rate=2e-6`, `lr_scheduler_type="constant"`, `max_completion_length=32768`; and ours where
    > it says nothing: `per_device_train_batch_size=1`, `disable_dropout=True`, `logging_steps=1`, `save_steps=12`, no
    > `num_train_epochs`.
    > `gradient_accumulation_steps` is derived. With `warmup_steps`, `constant` is `constant_with_warmup`, whose first step
    > has a learning rate of 0.
    """

    _VALID_DICT_FIELDS = [  # noqa: RUF012 - as the parent declares it
        *DistillationConfig._VALID_DICT_FIELDS, "mass_target", "scale", "score", "selection", "teachers",
        "teacher_prompt", "guards", "max_completion_length",
    ]  # fmt: skip

    # Parameters whose default values are overridden
    max_steps: int = field(
        default=120, metadata={"help": "Number of optimizer steps. The paper trains for 120 steps (Appendix A.7)."}
    )
    num_train_epochs: float = field(  # the parent's is 3, which is refused as any other
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
    save_steps: float = field(
        default=12, metadata={"help": "Save a checkpoint every X updates steps: ten in the paper's 120 steps."}
    )

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
        metadata={"help": "Select by Eq. 8, per branch: true, false (every sample), 'random' or 'smallest'."},
    )
    importance_sampling_mode: str = field(
        default="mask",
        metadata={"help": "w_t of Eq. 2 and 9 outside its band: 'mask' (0), 'truncate' (clamp), or 'none' (w_t = 1)."},
    )
    importance_sampling_low: float = field(default=0.5, metadata={"help": "Lower bound of the band, inclusive."})
    importance_sampling_high: float = field(default=2.0, metadata={"help": "Upper bound of the band, inclusive."})
    num_iterations: int = field(default=1, metadata={"help": "Optimizer updates per rollout, one."})

    rebalance: bool = field(
        default=True, metadata={"help": "Whether kept samples are rebalanced across ranks by tokens."}
    )
    padding_free: bool | None = field(
        default=None, metadata={"help": "Forward samples without padding; default where that is less work."}
    )
    max_tokens_per_micro_batch: int | None = field(
        default=None, metadata={"help": "Tokens of one forward and backward, padding included; at least one sample."}
    )
    student_logps: str = field(
        default="trainer",
        metadata={"help": "Student's log-probs at selection: of 'trainer' (one more forward), 'engine' or 'auto'."},
    )
    loss_prefix_tokens: int | None = field(
        default=None, metadata={"help": "Score and train only the first so many tokens of each completion."}
    )
    optimizer_moments: str = field(
        default="shared", metadata={"help": "Adam's first moment: 'shared', or 'per_branch' (experimental)."}
    )
    verbose: bool = field(default=False, metadata={"help": "Print transformers' dictionaries, not a line a step."})
    diagnostics_steps: int = field(
        default=10, metadata={"help": "Measure gradients once per branch in every X optimizer steps; 0 is never."}
    )
    guards: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Thresholds of the guards by name, over the defaults; null switches one off."}
    )
    eval_tasks: list[str] | str | None = field(
        default=None, metadata={"help": "Tasks of lm-eval that each evaluation measures, too: names or YAML files."}
    )
    eval_tasks_items: int = field(default=64, metadata={"help": "Rows of each of eval_tasks, drawn once."})

    # Parameters of the baselines
    token_rule: str = field(
        default="none",
        metadata={"help": "Which tokens count: 'none' (all alike), 'relaxed_opd', 'selectkd' or 'teacher_free'."},
    )
    relaxed_mixture: float = field(default=0.3, metadata={"help": "lambda of Relaxed OPD, of its reward floor."})
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
    divergence: str = field(
        default="sampled", metadata={"help": "At each token: 'sampled' (Eq. 1), 'full' or 'top_k'."}
    )
    divergence_top_k: int = field(default=20, metadata={"help": "Likeliest tokens of the teacher for 'top_k'."})
    baseline: str = field(default="none", metadata={"help": "'kl' takes noise out of the sampled gradient."})

    completion_lengths: dict[Any, Any] | str | None = field(default=None, metadata={"help": "Derived. Leave it out."})

    # Parameters of the data
    prompts_per_step: int = field(
        default=512, metadata={"help": "Prompts of one optimizer step over all ranks, before selection."}
    )
    max_prompt_length: int = field(
        default=4096, metadata={"help": "Tokens a prompt may have; longer ones keep their last tokens."}
    )
    split_special_tokens: bool = field(
        default=False, metadata={"help": "Encode special tokens in the text of prompts as the text they are."}
    )
    prefill: bool = field(
        default=False, metadata={"help": "Continue prompts that end with an assistant turn; else they are refused."}
    )
    trust_checkpoint: bool = field(
        default=False, metadata={"help": "Let DeepSpeed and FSDP unpickle a checkpoint outside output_dir."}
    )

    rollout_servers: list[str] | str | None = field(
        default=None, metadata={"help": "URLs of vLLM servers that write the rollouts, in place of use_vllm."}
    )
    rollout_lag: int = field(
        default=0, metadata={"help": "1: rollout_servers write a step's completions while the step before trains."}
    )

    # Parameters of the teachers
    teachers: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Teacher of each branch: vLLM URL or several, model, 'adapter_off', 'adapter_start', 'self'."
        },
    )
    teacher_prompt: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "What the teacher of a branch sees: a text or messages with {prompt}."}
    )
    score_tokens: int = field(
        default=65536,  # it keeps nothing but its last hidden states
        metadata={"help": "Tokens per scoring forward, counted in sequences of the longest prompt and completion."},
    )
    teacher_timeout: float = field(
        default=900.0, metadata={"help": "Seconds to wait for gone servers of a teacher or of rollouts, then stop."}
    )

    # Parameters of the run's folder
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Remove checkpoints and model of an earlier run in output_dir, which is refused otherwise."},
    )

    # Old names, for one release
    gap_student: str | None = field(default=None, metadata={"help": "Old name of student_logps."})
    exchange: bool | None = field(default=None, metadata={"help": "Old name of rebalance."})
    teacher_patience: float | None = field(default=None, metadata={"help": "Old name of teacher_timeout."})
    score_batch_size: int | None = field(
        default=None, metadata={"help": "Old form of score_tokens, in sequences of the longest kind."}
    )

    def __post_init__(self):
        given = late_settings.as_given(self)
        longest = method_rules.read_completion_length(self)
        if not (self.use_cpu or torch.accelerator.is_available() or is_torch_xla_available()):
            self.use_cpu = True  # transformers wants it said
        method_rules.take_old_names(self)
        method_rules.check_values(self)
        # Before the parent's checks, which hand gradient_accumulation_steps to DeepSpeed.
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        method_rules.derive_accumulation(self, world_size)
        settle_metric(self, Schedule.parse(self.schedule).branches)  # before the parent, which has another direction
        super().__post_init__()
        settle_schedule(self)
        if self.world_size != world_size:  # a launcher that does not set WORLD_SIZE
            self.gradient_accumulation_steps = None
            method_rules.derive_accumulation(self, self.world_size)

        words = {"true": True, "false": False, "auto": "auto"}  # on the command line
        place: Any = self.resume_from_checkpoint
        place = os.path.expanduser(place) if isinstance(place, str) else place
        self.resume_from_checkpoint: Any = words.get(str(place).lower(), place)
        if self.use_vllm and self.vllm_mode == "colocate" and self.vllm_max_model_length is None:
            # Else vLLM wants room for the longest sequence that the model can take.
            self.vllm_max_model_length = self.max_prompt_length + longest
        method_rules.check_method(self, Schedule.parse(self.schedule))
        method_rules.settle_spellings(self)
        setting_rules.refuse(self)
        check_generation_kwargs(self)
        setting_rules.warn(setting_rules.without_effect(self), self)
        setting_rules.warn(method_rules.without_effect(self), self)
        late_settings.note(self, given)

    @classmethod
    def for_model(cls, model: Any) -> "CaMOPDConfig":
        """The paper's settings, with an `output_dir` named after the model, an id, path or object."""
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        return cls(f"{name.split('/')[-1]}-CaMOPD")

    @property
    def score_rows(self) -> int:
        """Sequences of the longest kind that `score_tokens` holds, at least one."""
        return max(1, self.score_tokens // (self.max_prompt_length + self.longest_completion))

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
                f"{name} has a value for {sorted(unknown, key=str)}, but the branches of schedule {self.schedule!r} are "
                f"{list(branches)}. Fix the name, or add the branch to the schedule."
            )
        missing = [branch for branch in branches if branch not in value]
        if missing:
            raise ValueError(
                f"{name} has no value for branch {missing[0]!r} of schedule {self.schedule!r}, only for "
                f"{sorted(value, key=str)}. Add it, or give one value for all branches."
            )
        return {branch: value[branch] for branch in branches}
