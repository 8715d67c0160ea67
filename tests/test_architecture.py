"""Who may import whom: levels, and one module for each outside thing."""

import ast
from pathlib import Path

import samfn

ROOT = Path(__file__).parent.parent
LEVELS = {
    "files": 0,
    "randomness": 0,
    "kernels": 0,
    "tree": 0,
    "schedules": 0,
    "batches": 1,
    "border": 1,
    "hooks": 1,
    "tensorfile": 1,
    "gradient": 2.1,
    "average": 2,
    "perturb": 2,
    "descend": 2,
    "sampling": 2,
    "memory": 1,
    "lending": 2,
    "stateless": 3,
    "export": 4,
    "method": 3,
    "landscape": 4,
    "objective": 3,
    "monitor": 3,
    "optimizer": 3,
    "methods": 4,
    "sharpness": 4,
    "combinators": 4,
    "distributed.processes": 4.1,
    "distributed.messages": 4.1,
    "distributed.batch_norm": 4.2,
    "distributed.replicas": 4.2,
    "distributed.shards": 4.3,
    "distributed": 4.4,
    "per_example": 4,
    "update": 5,
    "checkpoint": 6,
    "engine": 6,
    "callbacks": 7,
    "compiled": 6,
    "__init__": 8,
}
# Outside thing -> the files that may know it.
OWNERS = {
    "rich": {"recipes/console.py"},
    "matplotlib": {"recipes/plots.py"},
    "safetensors": {"samfn/tensorfile.py", "bench/checkpoints.py"},
    "filelock": {"samfn/files.py"},
    "torch.export": {"samfn/export.py"},
    "torchvision": {
        "bench/zoo/networks.py",
        "recipes/pictures.py",
        "recipes/cifar.py",
        "recipes/augment.py",
        "recipes/models.py",
    },
    "sklearn": {"recipes/data.py"},
    "einops": {"recipes/models.py", "recipes/augment.py"},
    "tyro": {
        "recipes/config.py",
        "recipes/label_noise.py",
        "recipes/landscape.py",
        "recipes/sweep.py",
        "recipes/sharpness.py",
        "recipes/compare.py",
        "recipes/solutions.py",
        "bench/checkpoints.py",
        "bench/compare.py",
        "bench/compile_time.py",
        "bench/cost_model.py",
        "bench/memory.py",
        "bench/monitor.py",
        "bench/methods.py",
        "bench/scaling.py",
        "bench/step_time.py",
        "bench/faults/__main__.py",
        "bench/zoo/__main__.py",
    },
    "torch.func": {"samfn/gradient.py", "recipes/models.py"},
    "torch.nn": {
        "bench/zoo/check.py",
        "bench/zoo/habits.py",
        "bench/zoo/networks.py",
        "samfn/gradient.py",
        "samfn/lending.py",
        "samfn/distributed/batch_norm.py",
        "samfn/distributed/shards.py",
        "samfn/export.py",
        "samfn/kernels.py",
        "samfn/stateless.py",
        "recipes/models.py",
        "recipes/augment.py",
        "recipes/task.py",
        "recipes/solutions.py",
        "bench/candidates.py",
        "bench/checkpoints.py",
        "bench/cost_model.py",
        "bench/gpu.py",
        "bench/methods.py",
        "bench/monitor.py",
        "bench/networks.py",
        "bench/peers.py",
        "bench/scaling.py",
    },
    "tensorboard": {"recipes/loggers.py"},
    "torch.utils.tensorboard": {"recipes/loggers.py"},
    "wandb": {"recipes/loggers.py"},
    "trackio": {"recipes/loggers.py"},
    "torch.optim": {"samfn/descend.py", "samfn/optimizer.py", "samfn/stateless.py"},
    "torch._dynamo": {"bench/faults/trial.py", "samfn/compiled.py"},
    "torch._inductor": {"samfn/compiled.py"},
    "torch.distributed": {
        "bench/scaling.py",
        "samfn/distributed/__init__.py",
        "samfn/distributed/batch_norm.py",
        "samfn/distributed/processes.py",
    },
}


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


def module_of(path):
    """Return the name of a module of samfn, or of a package in it."""
    parts = path.relative_to(ROOT / "samfn").with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def test_modules_import_from_lower_levels_only():
    found = {module_of(path): path for path in sources("samfn")}
    assert found.keys() == LEVELS.keys()
    for module, path in found.items():
        for name in imported(path):
            package, _, other = name.partition(".")
            while package == "samfn" and other:
                if other in LEVELS:
                    assert LEVELS[other] < LEVELS[module], f"{module} imports {name}"
                    break
                other = other.rpartition(".")[0]


def test_the_library_knows_nothing_of_recipes():
    for path in sources("samfn"):
        outer = {"recipes", "bench", "tests"}
        assert not outer & {name.partition(".")[0] for name in imported(path)}


def test_each_outside_thing_has_its_module():
    for path in sources("samfn", "recipes", "bench"):
        where = str(path.relative_to(ROOT))
        for outside, owners in OWNERS.items():
            names = {
                n for n in imported(path) if n == outside or n.startswith(outside + ".")
            }
            assert not names or where in owners, f"{where} imports {names}"


def restricted(path, node):
    """Return whether a call is of PyTorch's reader that refuses all but tensors."""
    return str(path.relative_to(ROOT)) == "recipes/weights.py" and any(
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


def test_the_public_names_exist():
    assert all(hasattr(samfn, name) for name in samfn.__all__)


def test_public_functions_say_what_they_do():
    for name in samfn.__all__:
        assert getattr(samfn, name).__doc__, name
