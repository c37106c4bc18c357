"""The house rules, checked on the syntax tree of every file and on a running interpreter.

Each rule is a function from a source to its violations, and is shown a source that breaks it.
"""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Package -> the packages that it may import, besides itself.
BELOW = {
    "cli": {"rl", "evals", "rollout", "policy", "rewards", "data", "recipes", "common"},
    "rl": {"evals", "rollout", "policy", "rewards", "data", "recipes", "common"},
    "evals": {"rollout", "policy", "rewards", "data", "recipes", "common"},
    "rollout": {"policy", "rewards", "data", "recipes", "common"},
    "policy": {"data", "recipes", "common"},
    "rewards": {"common"},
    "data": {"recipes", "common"},
    "recipes": {"common"},
    "common": set(),
}
HEAVY = {
    "accelerate", "cv2", "datasets", "deepspeed", "diffusers", "onnxruntime", "open_clip", "peft",
    "rapidocr", "ray", "torchvision", "transformers", "trl", "vllm",
}  # fmt: skip
# Each of these imports transformers, which imports torchvision wherever it is installed.
NEEDS_TORCHVISION = {"diffusers", "open_clip", "peft", "torchvision", "transformers", "trl", "vllm"}
WITHOUT_TORCH = {"common", "recipes"}
# Who talks to the person that started it.
MAY_PRINT = ("cli/", "benchmarks/", "examples/", "tests/")
MAX_LINES = 400
MAX_LINES_OUTSIDE = 500


# --- what the rules look at ---------------------------------------------------------------------


def source_files() -> list[Path]:
    folders = [*BELOW, "tests", "benchmarks", "examples"]
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield (module, line) of each import below `tree`, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), node.lineno


def import_time(tree: ast.Module) -> ast.Module:
    """Return the statements that run when the module is imported."""

    def kept(body: list[ast.stmt]) -> list[ast.stmt]:
        result: list[ast.stmt] = []
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                result += kept(node.orelse)
            elif isinstance(node, ast.ClassDef | ast.If | ast.Try | ast.With | ast.For):
                result += kept(node.body)
                for name in ("orelse", "finalbody"):
                    result += kept(getattr(node, name, []))
                for handler in getattr(node, "handlers", []):
                    result += kept(handler.body)
            else:
                result.append(node)
        return result

    return ast.Module(kept(tree.body), [])


def top(module: str) -> str:
    return module.split(".")[0]


def dotted(node: ast.expr) -> str:
    return ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""


# --- the rules: (path inside the repository, source) -> violations ------------------------------


def upward_imports(path: str, source: str) -> list[str]:
    package = top(path.replace("/", "."))
    if package not in BELOW:
        return []
    return [
        f"{path}:{line} {package} may not import {module or '.'}"
        for module, line in imported(ast.parse(source))
        if module.startswith(".")
        or (top(module) in {*BELOW, "tests", "benchmarks", "examples"} - {package} - BELOW[package])
    ]


def heavy_package_imports(path: str, source: str) -> list[str]:
    """`import PACKAGE` stays cheap: what is heavy is imported by the leaf module that needs it."""
    if not path.endswith("__init__.py"):
        return []
    return [
        f"{path}:{line} imports {module} when the package is imported"
        for module, line in imported(import_time(ast.parse(source)))
        if top(module) in HEAVY
    ]


def torch_on_the_ground_floor(path: str, source: str) -> list[str]:
    package = top(path.replace("/", "."))
    if package not in WITHOUT_TORCH:
        return []
    return [
        f"{path}:{line} {package} imports {module}"
        for module, line in imported(import_time(ast.parse(source)))
        if top(module) in HEAVY | {"torch"}
    ]


def unprepared_torchvision(path: str, source: str, init_source: str) -> list[str]:
    """Where a module needs torchvision, its top-level package's `__init__.py` prepares it."""
    if "prepare_torchvision()" in init_source:
        return []
    return [
        f"{path}:{line} imports {module}, and {top(path.replace('/', '.'))}/__init__.py does not "
        "call prepare_torchvision() (common/heavy.py)"
        for module, line in imported(import_time(ast.parse(source)))
        if top(module) in NEEDS_TORCHVISION
    ]


def unsafe_calls(path: str, source: str) -> list[str]:
    """Nothing that runs code from data: pickles, unrestricted torch.load, eval, shells, YAML."""
    tree = ast.parse(source)
    found = [
        (line, f"imports {module}")
        for module, line in imported(tree)
        if top(module) in {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve"}
    ]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        given = {
            keyword.arg: keyword.value.value
            for keyword in node.keywords
            if isinstance(keyword.value, ast.Constant)
        }
        if name in {"eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"}:
            found.append((node.lineno, f"calls {name}"))
        if name == "torch.load" and given.get("weights_only") is not True:
            found.append((node.lineno, "calls torch.load without weights_only=True"))
        if name in {"np.load", "numpy.load"} and given.get("allow_pickle") is True:
            found.append((node.lineno, f"calls {name} with allow_pickle=True"))
        found += [
            (node.lineno, f"passes {argument}=True")
            for argument in ("shell", "trust_remote_code")
            if given.get(argument) is True
        ]
    return [f"{path}:{line} {what}" for line, what in found]


def prints(path: str, source: str) -> list[str]:
    if path.startswith(MAY_PRINT):
        return []
    return [
        f"{path}:{node.lineno} prints; only cli/ does"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and dotted(node.func) in {"print", "sys.stdout.write", "rich.print", "typer.echo"}
    ]


def too_long(path: str, source: str) -> list[str]:
    limit = MAX_LINES if top(path.replace("/", ".")) in BELOW else MAX_LINES_OUTSIDE
    lines = len(source.splitlines())
    return [f"{path} has {lines} lines, {limit} are allowed"] if lines > limit else []


RULES: list[Callable[[str, str], list[str]]] = [
    upward_imports,
    heavy_package_imports,
    torch_on_the_ground_floor,
    unsafe_calls,
    prints,
    too_long,
]


# --- the rules hold -----------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds_everywhere(rule: Callable[[str, str], list[str]]) -> None:
    files = source_files()
    violations = [
        violation
        for path in files
        for violation in rule(path.relative_to(ROOT).as_posix(), path.read_text("utf-8"))
    ]
    assert len(files) > 20, "the rule looked at too few files to mean anything"
    assert not violations, "\n".join(violations)


@pytest.mark.parametrize("package", BELOW)
def test_torchvision_is_prepared_by_the_package(package: str) -> None:
    init = (ROOT / package / "__init__.py").read_text("utf-8")
    violations = [
        violation
        for path in (ROOT / package).rglob("*.py")
        for violation in unprepared_torchvision(
            path.relative_to(ROOT).as_posix(), path.read_text("utf-8"), init
        )
    ]
    assert not violations, "\n".join(violations)


def test_every_package_is_in_the_order() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages <= {*BELOW, "tests", "benchmarks"}


def test_the_order_has_no_circle() -> None:
    for package, below in BELOW.items():
        assert all(package not in BELOW[other] for other in below)
        assert all(BELOW[other] <= below for other in below), f"{package} skips a floor"


# --- and each of them can fail ------------------------------------------------------------------

BAD = [
    (upward_imports, "policy/x.py", "from rl.grpo import train", 1),
    (upward_imports, "evals/x.py", "def f():\n    import rl", 2),
    (upward_imports, "rewards/x.py", "import policy.config", 1),
    (upward_imports, "common/x.py", "from recipes import Recipe", 1),
    (upward_imports, "rl/x.py", "from .grpo import train", 1),
    (upward_imports, "data/x.py", "from tests.unit import stand_in", 1),
    (heavy_package_imports, "rollout/__init__.py", "import os\nimport vllm", 2),
    (heavy_package_imports, "rl/sub/__init__.py", "try:\n    from trl import X\nfinally: ...", 2),
    (heavy_package_imports, "policy/__init__.py", "class A:\n    import diffusers.models", 2),
    (torch_on_the_ground_floor, "recipes/x.py", "import torch.nn as nn", 1),
    (torch_on_the_ground_floor, "common/x.py", "if True:\n    import torch", 2),
    (unsafe_calls, "rl/x.py", "import pickle", 1),
    (unsafe_calls, "rl/x.py", "def f():\n    from dill import loads", 2),
    (unsafe_calls, "rl/x.py", "torch.load('x')", 1),
    (unsafe_calls, "rl/x.py", "torch.load('x', weights_only=False)", 1),
    (unsafe_calls, "rl/x.py", "np.load('x', allow_pickle=True)", 1),
    (unsafe_calls, "rl/x.py", "eval('1')", 1),
    (unsafe_calls, "rl/x.py", "exec('1')", 1),
    (unsafe_calls, "rl/x.py", "yaml.load(text)", 1),
    (unsafe_calls, "rl/x.py", "subprocess.run('ls', shell=True)", 1),
    (unsafe_calls, "rl/x.py", "AutoModel.from_pretrained('x', trust_remote_code=True)", 1),
    (prints, "rl/x.py", "print('x')", 1),
    (prints, "common/x.py", "def f():\n    sys.stdout.write('x')", 2),
]


@pytest.mark.parametrize(("rule", "path", "source", "line"), BAD)
def test_rule_can_fail(
    rule: Callable[[str, str], list[str]], path: str, source: str, line: int
) -> None:
    violations = rule(path, source)
    assert len(violations) == 1
    assert violations[0].startswith(f"{path}:{line} ")


@pytest.mark.parametrize(
    ("path", "limit"), [("rl/x.py", 400), ("tests/test_x.py", 500), ("benchmarks/x.py", 500)]
)
def test_length_rule_can_fail(path: str, limit: int) -> None:
    assert too_long(path, "x = 1\n" * limit) == []
    assert len(too_long(path, "x = 1\n" * (limit + 1))) == 1


def test_torchvision_rule_can_fail() -> None:
    source = "import torch\nfrom transformers import AutoModel"
    assert len(unprepared_torchvision("policy/x.py", source, "")) == 1
    assert unprepared_torchvision("policy/x.py", source, "prepare_torchvision()\n") == []
    assert unprepared_torchvision("policy/x.py", "def f():\n    import vllm", "") == []


GOOD = [
    (upward_imports, "cli/x.py", "from rl.grpo import train\nimport evals, common.seeds"),
    (upward_imports, "policy/x.py", "import policy.config\nimport torch\nimport relic"),
    (heavy_package_imports, "rl/__init__.py", "import torch\ndef f():\n    import trl"),
    (heavy_package_imports, "rl/grpo.py", "import trl"),
    (torch_on_the_ground_floor, "common/x.py", "def f():\n    import torch"),
    (torch_on_the_ground_floor, "common/x.py", "if TYPE_CHECKING:\n    import torch"),
    (torch_on_the_ground_floor, "policy/x.py", "import torch"),
    (unsafe_calls, "rl/x.py", "torch.load('x', weights_only=True); model.eval(); np.load('x')"),
    (unsafe_calls, "rl/x.py", "yaml.safe_load(text); subprocess.run(['ls'], shell=False)"),
    (prints, "cli/x.py", "print('x')"),
    (prints, "rl/x.py", "console.print('x'); pprint('x')"),
]


@pytest.mark.parametrize(("rule", "path", "source"), GOOD)
def test_rule_lets_the_rest_pass(
    rule: Callable[[str, str], list[str]], path: str, source: str
) -> None:
    assert rule(path, source) == []


# --- what importing really does -----------------------------------------------------------------


@pytest.mark.parametrize("package", ["common", "recipes", "common.heavy"])
def test_importing_takes_no_torch(package: str) -> None:
    """In a fresh interpreter, because this one has imported everything already."""
    code = f"import sys, {package}; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = {top(module) for module in result.stdout.split()}
    assert top(package) in loaded
    assert not loaded & (HEAVY | {"torch"})
