"""What the package uses of other libraries beyond their public interface: named in the tables here, and there as they say.

The tables are compared with the code in both directions: a new use is found, and wants a line. And tests use nothing of the
package beyond its own public interface.
"""

import ast
import contextlib
import inspect
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import transformers.trainer
from accelerate import Accelerator
from datasets import IterableDataset
from packaging.version import Version
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations import deepspeed
from trl import DistillationTrainer
from trl.generation import vllm_generation

import camopd
from camopd import CaMOPDTrainer


ROOT = Path(camopd.__file__).parent
TRAINER = "trainer.py"

# What `CaMOPDTrainer` overrides, as its parents have it: `__init__`, TRL's part, and transformers'.
OVERRIDDEN = """
__init__(self, model, teacher_model=None, args=None, train_dataset=None, eval_dataset=None, processing_class=None, \
callbacks=None, optimizers=(None, None), quantization_config=None, peft_config=None, tools=None)
_generate_single_turn(self, prompt_ids, images, multimodal_fields, has_tool_images=False)
_prepare_inputs(self, generation_batch)
_save_checkpoint(self, model, trial)
_tokenize_prompts(self, prompts)
compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None)
create_model_card(self, model_name=None, dataset_name=None, tags=None)
get_eval_dataloader(self, eval_dataset=None)
get_train_dataloader(self)
prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None)
training_step(self, model, inputs, num_items_in_batch)
_get_grad_norm(self, model, grad_norm=None)
_get_output_dir(self, trial)
_load_best_model(self)
_load_from_checkpoint(self, resume_from_checkpoint, model=None)
_push_from_checkpoint(self, checkpoint_folder)
create_optimizer(self, model=None)
log(self, logs, start_time=None)
evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix='eval')
evaluation_loop(self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix='eval')
get_optimizer_cls_and_kwargs(args, model=None)
get_test_dataloader(self, test_dataset)
num_examples(self, dataloader)
save_model(self, output_dir=None, _internal_call=False)
push_to_hub(self, commit_message='End of training', blocking=True, token=None, revision=None, private=None, **kwargs)
predict(self, test_dataset, ignore_keys=None, metric_key_prefix='test')
train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None)
"""

# Their privates that are called and not overridden.
CALLED = """
_finish_current_push(self)
_generate(self, prompts)
_get_learning_rate(self)
_load_rng_state(self, checkpoint)
"""

# Attributes of the parents that are read or set: on the class, and on the instance.
ATTRIBUTES = {
    "_eval_dataloaders", "_forward_redirection", "_is_vlm", "_metrics", "_name", "_paper", "_step",
    "_tag_names", "_tokenizer",
}  # fmt: skip

# Privates of anything else, and who has them.
ELSEWHERE = {
    **dict.fromkeys(
        ("_dist", "_fix_param_name_to_vllm", "_iter_fsdp1_params", "_iter_named_params"), lambda: generation_of_trl()
    ),
    "_attn_implementation": lambda: PreTrainedConfig(),
    "_distributed": lambda: IterableDataset.from_generator(lambda: iter(())),
    "_get_default_store": lambda: torch.distributed.distributed_c10d,
    "_hf_deepspeed_config_weak_ref": lambda: deepspeed,
    "_is_stateful": lambda: PreTrainedModel,
    "_parameters": lambda: torch.nn.Module(),
    "_supports_attention_backend": lambda: PreTrainedModel,
}

# Names of other libraries' modules that are set anew, as <module>.<name> in the code that does it.
REPLACED: dict[str, object] = {
    "trl.generation.vllm_generation.LLM": vllm_generation,  # while the parent's `__init__` makes its engine
    "trl.generation.vllm_generation.VLLMClient": vllm_generation,  # or reaches its server
    "transformers.trainer.hf_api": transformers.trainer,  # while a push is under way; tests/test_hub.py sees what is sent
}


def generation_of_trl():
    """What TRL gathers weights for vLLM with, without a vLLM."""

    class Generation(vllm_generation.VLLMGeneration):
        def _init_vllm(self):
            pass

    return Generation(model=None, accelerator=Accelerator(cpu=True), processing_class=None)


NAMEDTUPLE = {"_asdict", "_fields", "_make", "_replace"}  # public, in spite of their names


def rows(table: str) -> dict[str, str]:
    return {line.partition("(")[0]: line for line in table.strip().splitlines()}


EXPECTED = {**rows(OVERRIDDEN), **rows(CALLED)}
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(ROOT.rglob("*.py"))}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def defined_in(tree: ast.AST) -> set[str]:
    """Names of the functions, classes, variables and attributes that a piece of code makes."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return found


def attributes_of(body: list[ast.stmt]) -> set[str]:
    """What a class body defines, and what its methods set on `self`."""
    found = set()
    for node in body:
        if isinstance(node, ast.FunctionDef):
            found |= {node.name}
            found |= {
                each.attr
                for each in ast.walk(node)
                if isinstance(each, ast.Attribute)
                and isinstance(each.ctx, ast.Store)
                and ast.unparse(each.value) == "self"
            }
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            found |= {
                ast.unparse(target) for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            }
    return found


def body_of(tree: ast.Module, name: str) -> list[ast.stmt]:
    return next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)


PARENTS = [cls for cls in DistillationTrainer.__mro__ if "Trainer" in cls.__name__]
OF_PARENTS = set().union(
    *(attributes_of(body_of(ast.parse(textwrap.dedent(inspect.getsource(cls))), cls.__name__)) for cls in PARENTS)
)
TRAINER_BODY = body_of(TREES[ROOT / TRAINER], "CaMOPDTrainer")
OF_PACKAGE = set().union(*map(defined_in, TREES.values()))


def imported_in(tree: ast.AST) -> dict[str, str]:
    """Dotted name of each thing that a file imports from other libraries than Python's own, by its name there."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname or alias.name.partition(".")[0]: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return {name: whole for name, whole in found.items() if whole.partition(".")[0] not in sys.stdlib_module_names}


def privates_of(path: Path, tree: ast.AST) -> set[str]:
    """Privates that a file uses and that are not the package's own."""
    own, found = defined_in(tree), {part for whole in imported_in(tree).values() for part in whole.split(".")}
    for node in ast.walk(tree):
        name, on_itself = "", False
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in sys.stdlib_module_names:
            name, on_itself = node.attr, ast.unparse(node.value) in ("self", "cls", "super()")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr", "delattr"):
            name = str(getattr(node.args[1], "value", ""))
        inherited = name in OF_PARENTS and (path.name == TRAINER or not on_itself)
        if inherited or name not in (OF_PACKAGE if on_itself else own):
            found.add(name)
    return {name for name in found if is_private(name)} - NAMEDTUPLE


def replaced_in(tree: ast.AST) -> set[str]:
    """Names that a file sets in modules, classes or functions of other libraries."""
    imported = imported_in(tree)
    return {
        f"{imported[node.value.id]}.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name) and node.value.id in imported
    }  # fmt: skip


def signature(function) -> inspect.Signature:
    """Without annotations."""
    found = inspect.signature(function)
    plain = [value.replace(annotation=inspect.Parameter.empty) for value in found.parameters.values()]
    return found.replace(parameters=plain, return_annotation=inspect.Signature.empty)


def test_tables_name_all_private_uses_and_no_other():
    used = {name: path for path, tree in TREES.items() for name in privates_of(path, tree)}
    used |= {name: ROOT / TRAINER for name in attributes_of(TRAINER_BODY) & OF_PARENTS if is_private(name)}
    known = {name for name in EXPECTED if is_private(name) and name != "__init__"} | ATTRIBUTES | set(ELSEWHERE)
    assert {name: str(path.relative_to(ROOT)) for name, path in used.items() if name not in known} == {}
    assert known - set(used) == set()


def test_table_names_all_that_is_replaced_in_other_libraries():
    assert set().union(*map(replaced_in, TREES.values())) == set(REPLACED)
    for name, module in REPLACED.items():
        last = name.rpartition(".")[2]
        assert hasattr(module, last) or last in imported_in(ast.parse(inspect.getsource(module))), name


def test_table_names_all_that_the_trainer_overrides():
    ours = {node.name for node in TRAINER_BODY if isinstance(node, ast.FunctionDef)}
    assert {name for name in ours if hasattr(DistillationTrainer, name)} == set(rows(OVERRIDDEN))


def test_trainer_sets_no_attribute_of_a_parent_by_accident():
    """One that a new version has by a name that we have taken would be overwritten in silence."""
    on_purpose = {"_name", "_paper", "_step", "_tag_names", "log_completions"}
    assert attributes_of(TRAINER_BODY) & OF_PARENTS - set(rows(OVERRIDDEN)) == on_purpose


@pytest.mark.parametrize("name", EXPECTED)
def test_parent_has_the_method_with_the_parameters_that_we_expect(name):
    made = {}
    exec(f"def {EXPECTED[name]}: ...", made)
    expected = list(signature(made[name]).parameters.values())
    found = list(signature(getattr(DistillationTrainer, name)).parameters.values())
    if name == "push_to_hub" and Version(transformers.__version__) < Version("5.23"):
        expected = [value for value in expected if value.name != "private"]
    assert found[: len(expected)] == expected
    # What a newer version has added: calls without it stay right.
    assert all(value.default is not inspect.Parameter.empty for value in found[len(expected) :])


@pytest.mark.parametrize("name", [name for name in rows(OVERRIDDEN) if name != "__init__"])
def test_override_takes_every_call_that_the_parent_takes(name):
    parent, ours = (inspect.signature(getattr(cls, name)).parameters for cls in (DistillationTrainer, CaMOPDTrainer))
    needed = [each for each, value in parent.items() if value.default is inspect.Parameter.empty]
    optional = [each for each in parent if each not in needed]
    call = inspect.Signature(list(ours.values())).bind
    call(*needed)
    call(*needed, *optional)
    call(*needed, **dict.fromkeys(optional))


def calls() -> list[tuple[str, ast.Call]]:
    """Calls of the parents' methods: on `super()`, and of those of their privates that are not overridden."""
    found = []
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                on, name = ast.unparse(node.func.value), node.func.attr
                if (path.name == TRAINER and on == "super()") or name in rows(CALLED):
                    found.append((name, node))
    return found


@pytest.mark.parametrize(
    ("name", "call"), [pytest.param(name, node, id=ast.unparse(node)[:60]) for name, node in calls()]
)
def test_parent_takes_our_call(name, call):
    positional = [None] * (1 + sum(not isinstance(value, ast.Starred) for value in call.args))  # with `self`
    by_name = {keyword.arg: None for keyword in call.keywords if keyword.arg is not None}
    whole = len(positional) > len(call.args) and len(by_name) == len(call.keywords)
    takes = inspect.signature(getattr(DistillationTrainer, name))
    (takes.bind if whole else takes.bind_partial)(*positional, **by_name)


@pytest.mark.parametrize("name", sorted(ATTRIBUTES))
def test_parent_has_the_attribute(name):
    assert name in OF_PARENTS


@pytest.mark.parametrize("name", ELSEWHERE)
def test_other_library_has_the_attribute(name):
    assert hasattr(ELSEWHERE[name](), name)


def test_transformers_gives_the_loader_s_items_to_the_micro_steps_as_they_come():
    """`get_batch_samples` takes one item per micro-step; `one_item_per_micro_step` makes them so."""
    assert str(signature(DistillationTrainer.get_batch_samples)) == "(self, epoch_iterator, num_batches, device)"


# ------------------------------------------------------------------------------------------- what tests use of the package

TESTS = Path(__file__).parent
# "<file>: <name>" of a private of the package that a test may touch, and why there is no other way.
TOUCHED: dict[str, str] = {}
NOT_OURS = {*EXPECTED, *ELSEWHERE, *NAMEDTUPLE}  # whose names the package has only from others


def touched_in(code: str) -> list[tuple[int, str]]:
    """Line and name of each private of the package that a file of tests reads, replaces or overrides; also in the code that
    it has as a text, for another process. What a class of the tests sets on itself is its own."""
    tree, found = ast.parse(code), []
    ours = {name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and from_us(node)
            for name in (alias.asname or alias.name for alias in node.names)}  # fmt: skip
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls"):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom) and from_us(node):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ClassDef) and any(
            ast.unparse(base).partition(".")[0] in ours for base in node.bases
        ):
            names = [each.name for each in node.body if isinstance(each, ast.FunctionDef)]
        elif isinstance(node, ast.Call | ast.Tuple):  # "name" beside what has it, or "dotted.name"
            parts = node.args if isinstance(node, ast.Call) else node.elts
            texts = [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
            beside = len(texts) < len(parts)
            names = [word for text in texts if beside or "." in text for word in text.replace(":", ".").split(".")]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "import" in node.value:
            with contextlib.suppress(SyntaxError):
                found += [(node.lineno, name) for _, name in touched_in(textwrap.dedent(node.value))]
        found += [(node.lineno, name) for name in names if is_private(name) and name in OF_PACKAGE - NOT_OURS]
    return found


def from_us(node: ast.ImportFrom) -> bool:
    return (node.module or "").partition(".")[0] == "camopd"


def test_tests_touch_no_private_of_the_package():
    """Behaviour is reached by what is public: an argument, a fake server, the name of a library in a module. Where another
    file needs a name, it is public."""
    found = [(path, line, name) for path in sorted({*TESTS.rglob("*.py")} - {Path(__file__)})
             for line, name in touched_in(path.read_text(encoding="utf-8"))]  # fmt: skip
    new = [
        f"{path.relative_to(TESTS)}:{line}: {name}"
        for path, line, name in found
        if f"{path.name}: {name}" not in TOUCHED
    ]
    assert not new, "\n".join(new)
    assert TOUCHED.keys() == {f"{path.name}: {name}" for path, _, name in found} and len(TOUCHED) <= 5


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("watchdog._beat_often", ["_beat_often"]),
        ("super()._beat_often()", ["_beat_often"]),
        ("self._beat_often()", []),
        ("from camopd.watchdog import Board, _now", ["_now"]),
        ("from other import _now", []),
        ("from camopd import watchdog as w\nclass Dog(w.Watchdog):\n    def _beat_often(self): pass", ["_beat_often"]),
        ("class Dog:\n    def _beat_often(self): pass", []),
        ("patch.setattr(dog, '_beat_often', None)", ["_beat_often"]),
        ("patch.setattr('camopd.watchdog.Watchdog._beat_often', None)", ["_beat_often"]),
        ("before(*{'place': (dog, '_beat_often')}['place'])", ["_beat_often"]),
        ("('_beat_often', '_now')", []),
        ("name.endswith('_now')", []),
        ("script = 'from camopd.watchdog import _now'", ["_now"]),
        ("trainer._save_checkpoint", []),  # of transformers
    ],
)
def test_private_that_a_test_touches_is_found(code, names):
    assert [name for _, name in touched_in(code)] == names
