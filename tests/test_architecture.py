"""Who may import whom: an order of packages, and the owners of each outside thing."""

import ast
from functools import cache

import pytest

import samfn
from tests import ROOT

# Files and packages, each with those below it that it may import before it.
ORDER = {
    "samfn": "tree support schedules loss gradient perturb methods descend optimizers"
    " modules distributed step imperative storage training measure compiled",
    "recipes": "errors roles trainers terminal plots data models settings train text study"
    " cifar_wrn finetune finetune_text sweep label_noise arms sharpness landscape compare",
    "bench": "measure networks peers_of_jax peers candidates cost_model cost scaling"
    " checkpoints gpu faults zoo",
}
# Outside thing -> the files and folders that may know it.
OWNERS = {
    "rich": {"recipes/terminal/console.py"},
    "matplotlib": {"recipes/plots"},
    "safetensors": {"samfn/storage/tensorfile.py", "bench/checkpoints.py"},
    "filelock": {"samfn/storage/files.py"},
    "torch.export": {"samfn/storage/export.py"},
    "torchvision": {"recipes/data", "recipes/models", "bench/zoo"},
    "sklearn": set(),  # takes a second to import, and its digits are a file
    "einops": {"recipes/models", "recipes/data/augment.py"},
    "tyro": {"recipes", "bench"},
    "torch.func": {
        "samfn/loss.py",
        "samfn/gradient.py",
        "samfn/measure/curvature.py",
        "recipes/models",
    },
    "torch.nn": {
        "samfn/gradient.py",
        "samfn/support/nested.py",
        "samfn/modules",
        "samfn/distributed",
        "samfn/measure/curvature.py",
        "samfn/storage/export.py",
        "recipes",
        "bench",
    },
    "tensorboard": {"recipes/train/loggers.py"},
    "torch.utils.tensorboard": {"recipes/train/loggers.py"},
    "wandb": {"recipes/train/loggers.py"},
    "trackio": {"recipes/train/loggers.py"},
    # The files for trainers are to be copied, also by those who have another trainer.
    **{name: set() for name in ("lightning", "accelerate", "skorch")},
    "timm": {"bench/zoo"},
    "transformers": {"recipes/models/language.py", "bench/zoo"},
    "peft": {"recipes/models/language.py"},
    "torch.optim": {"samfn/optimizers", "samfn/imperative", "samfn/modules"},
    "torch._dynamo": {"samfn/compiled", "bench/faults/trial.py"},
    "torch._inductor": {"samfn/compiled"},
    "torch.distributed": {
        "samfn/support/collectives.py",
        "samfn/distributed",
        "samfn/storage/sharded.py",
        "bench/scaling.py",
    },
}


@cache
def imported(path):
    """Return the modules that a file imports, with their packages."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    return found


def sources(*folders):
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("package", ORDER)
def test_packages_import_in_one_direction(package):
    order = {name: place for place, name in enumerate(ORDER[package].split())}
    for path in sources(package):
        own, *_ = path.relative_to(ROOT / package).with_suffix("").parts
        below = {name for name in order if own == "__init__" or order[name] < order[own]}
        for name in imported(path):
            top, _, rest = name.partition(".")
            first = rest.partition(".")[0]
            if top == package and first in order:
                assert first in below | {own}, f"{path} imports {name}"


def test_every_file_and_package_has_a_place_in_the_order():
    for package, order in ORDER.items():
        paths = [p for p in (ROOT / package).iterdir() if p.suffix == ".py" or p.is_dir()]
        found = {p.stem for p in paths if p.suffix or (p / "__init__.py").exists()}
        assert found - {"__init__"} == {*order.split()}


def test_the_library_knows_nothing_of_recipes():
    for path in sources("samfn"):
        outer = {"recipes", "bench", "tests"}
        assert not outer & {name.partition(".")[0] for name in imported(path)}


def test_each_outside_thing_has_its_module():
    for path in sources("samfn", "recipes", "bench"):
        where = path.relative_to(ROOT)
        places = {str(where), *map(str, where.parents)}
        for outside, owners in OWNERS.items():
            names = {
                n for n in imported(path) if n == outside or n.startswith(outside + ".")
            }
            assert not names or places & owners, f"{where} imports {names}"


def restricted(path, node):
    """Return whether a call is of PyTorch's reader that refuses all but tensors."""
    return str(path.relative_to(ROOT)) == "recipes/train/pretrained.py" and any(
        option.arg == "weights_only" and getattr(option.value, "value", None) is True
        for option in node.keywords
    )


def test_nothing_unpickles():
    forbidden = {"pickle", "cPickle", "joblib", "dill", "cloudpickle", "shelve", "marshal"}
    forbidden |= {"yaml", "torch.hub"}
    for path in sources("samfn", "recipes", "bench"):
        assert not imported(path) & forbidden, path
        safe = set()
        for node in ast.walk(ast.parse(path.read_text())):  # A call comes before its name.
            if isinstance(node, ast.Call) and restricted(path, node):
                safe.add(node.func)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node in safe:
                    continue
                called = f"{node.value.id}.{node.attr}"
                assert called not in {"torch.load", "numpy.load", "np.load"}, path
            if isinstance(node, ast.Name):
                assert node.id not in {"eval", "exec", "__import__"}, path


# Those that loops outside of this package rely on; more may come.
CONTRACT = """
    split load supervised evaluate norm perturb perturb_adaptive descend sgd adam adamw sam
    asam gsam init sam_update compile_update save restore SAM schedules
"""


def test_the_public_names_exist():
    assert all(hasattr(samfn, name) for name in CONTRACT.split())


def test_public_functions_say_what_they_do():
    public = [name for name in vars(samfn) if not name.startswith("_")]
    assert len(public) > 80
    for name in public:
        assert getattr(samfn, name).__doc__, name
