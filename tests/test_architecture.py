"""The house rules of the source, read from its syntax trees: who may import whom, and what is public."""

from __future__ import annotations

import ast
import dataclasses
import doctest
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import peftlib
from peftlib import train
from peftlib.methods.base import METHODS, Method

ROOT = Path(peftlib.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# Imports point one way. A module may import those named here (a package stands for all in it), nothing else of peftlib.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "report": {"errors"},
    "charts": {"report", "errors"},
    "progress": set(),
    "storage": {"errors"},
    "container": {"storage", "errors"},
    "attention": {"kernels", "errors"},
    "open_attention": {"attention", "errors"},
    "kernels": {"kernels", "errors"},
    "methods": {"methods", "kernels", "attention", "open_attention", "errors"},
    "site": {"methods.base", "open_attention", "errors"},
    "copies": {"site", "methods.base", "errors"},
    "observe": {"copies", "site", "methods.base", "methods.calls", "methods.linear", "attention"},
    "probe": {"observe", "copies", "methods.base", "errors"},
    "targets": {"probe", "site", "methods.base", "open_attention", "errors"},
    "selection": {"targets", "probe", "methods.base", "errors"},
    "merging": {"targets", "site", "storage", "methods.base", "methods.trained", "errors"},
    "part": {"methods.base", "errors"},
    "registry": {"site", "errors"},
    "freezing": {"methods.trained"},
    "tuning": {"part", "registry", "freezing", "merging", "site", "storage", "methods.base", "errors"},
    "attach": {
        *("tuning", "part", "registry", "freezing", "targets", "selection"),
        *("probe", "site", "methods", "open_attention", "errors"),
    },
    "fingerprint": {"merging", "targets", "storage", "methods.base", "methods.trained", "errors"},
    "sums": {"errors"},
    "summed": {"sums", "tuning", "part", "methods", "errors"},
    "arithmetic": {
        *("summed", "sums", "restore", "attach", "merging", "tuning", "part", "registry", "targets"),
        *("storage", "methods", "errors"),
    },
    "restore": {"attach", "tuning", "part", "targets", "methods.base", "errors"},
    "resume": {"tuning", "container", "storage", "errors"},
    "checkpoint": {
        *("resume", "restore", "fingerprint", "attach", "tuning", "part", "targets"),
        *("container", "storage", "methods", "errors"),
    },
    "batch_axes": {"probe", "observe", "copies", "methods.base", "methods.rowwise", "errors"},
    "routing": {
        *("batch_axes", "tuning", "registry", "probe"),
        *("site", "methods.base", "methods.rowwise", "errors"),
    },
    "overview": {"tuning", "registry", "targets", "probe", "report", "methods", "errors"},
    "commands": {"methods", "errors"},
    "memory": {
        "memory",
        "commands",
        "attach",
        "probe",
        "copies",
        "targets",
        "report",
        "charts",
        "progress",
        "methods",
        "errors",
    },
    "hf": {
        *("hf", "restore", "attach", "tuning", "part", "targets", "probe"),
        *("storage", "methods", "open_attention", "errors"),
    },
    # Of models and tunings the public names alone; files, tables and charts from the files that know nothing of either.
    "train": {"", "train", "commands", "memory", "container", "storage", "report", "charts", "progress"},
}

# Imports inside a function, which break a circle on purpose.
LATE = {("tuning", "checkpoint"), ("tuning", "resume")}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(p for p in parts if p != "__init__")


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Each import as (module, how): ``"now"``, ``"late"`` (in a function) or ``"types"`` (for the type checker)."""

    def walk(node: ast.AST, how: str) -> Iterator[tuple[str, str]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, how) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            assert node.module is not None
            if node.module == "peftlib":
                # A public name is a name of the package; anything else is a module.
                public = [a.name in peftlib.__all__ for a in node.names]
                yield from (
                    ("peftlib" if p else f"peftlib.{a.name}", how)
                    for a, p in zip(node.names, public, strict=True)
                )
            else:
                yield node.module, how
        for field in ast.iter_child_nodes(node):
            inner = how
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                inner = "late"
            elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                inner = "types"
            yield from walk(field, inner)

    yield from walk(tree, "now")


def own_imports(path: Path) -> Iterator[tuple[str, str]]:
    for module, how in imports(tree_of(path)):
        if module == "peftlib" or module.startswith("peftlib."):
            yield module.removeprefix("peftlib").removeprefix("."), how


def may(importer: str, imported: str) -> bool:
    rules = next((ALLOWED[r] for r in (importer, importer.partition(".")[0]) if r in ALLOWED), None)
    assert rules is not None, (
        f"peftlib/{importer.replace('.', '/')}.py is new: say in ALLOWED what it may import"
    )
    return any(imported == rule or (rule and imported.startswith(f"{rule}.")) for rule in rules)


@pytest.mark.parametrize("path", [p for p in FILES if name_of(p)], ids=name_of)
def test_imports_point_one_way(path: Path) -> None:
    importer = name_of(path)
    for imported, how in own_imports(path):
        if how == "types" or (how == "late" and (importer, imported) in LATE):
            continue
        assert may(importer, imported), f"{importer} imports {imported}"


def test_there_is_no_circle() -> None:
    edges = {name_of(p): {i for i, how in own_imports(p) if how == "now"} for p in FILES}
    names = set(edges)
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name in done or name not in names:
            return
        for other in edges[name] - {""}:
            visit(other, (*path, name))
        done.add(name)

    for name in names:
        visit(name, ())


@pytest.mark.parametrize("path", FILES, ids=lambda p: name_of(p) or "__init__")
def test_nothing_is_imported_from_outside_but_what_is_declared(path: Path) -> None:
    declared = {"torch", "einops", "safetensors", "numpy", "peftlib", "triton"}
    optional = {"matplotlib", "tqdm", "tokenizers", "transformers"}
    for module, how in imports(tree_of(path)):
        top = module.partition(".")[0]
        known = top in sys.stdlib_module_names or top in declared or (top in optional and how == "late")
        assert known, f"{name_of(path)} imports {module}"


def test_importing_it_loads_little() -> None:
    """Beyond what ``import torch`` has loaded: itself, three small packages and bits of the standard library."""
    code = "import sys, torch; before = set(sys.modules); import peftlib; print(*sorted(set(sys.modules) - before))"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent
    )
    loaded = run.stdout.split()
    tops = {n.partition(".")[0] for n in loaded}
    assert "peftlib" in tops
    assert tops - set(sys.stdlib_module_names) <= {"peftlib", "einops", "safetensors", "numpy"}
    assert len(loaded) < 90


# -- no special cases, nothing global ----------------------------------------------------------------------------------

FAMILIES = re.compile(
    r".*(gpt|llama|bert|mistral|mixtral|gemma|qwen|bloom|falcon|whisper|mamba).*|(opt|vit|clip|bart|phi|t5)[-_.]?\d*"
    r"|model_type|architectures",
    re.IGNORECASE,
)


def code_strings(tree: ast.Module) -> Iterator[str]:
    """Identifiers and strings that the code uses; docstrings and messages of errors are prose."""
    prose: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            prose.add(id(node.value))
        if isinstance(node, ast.Raise):
            prose |= {id(n) for n in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.value
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Name):
            yield node.id


@pytest.mark.parametrize(
    "path", [p for p in FILES if p.parent.name != "hf"], ids=lambda p: name_of(p) or "__init__"
)
def test_no_branch_on_the_name_or_family_of_a_model(path: Path) -> None:
    # Longer strings are sentences.
    found = [s for s in code_strings(tree_of(path)) if len(s) < 40 and FAMILIES.fullmatch(s)]
    if path.parent.name == "train":
        found = [s for s in found if s != "clip"]  # what happens to gradients
    assert not found


@pytest.mark.parametrize("path", FILES, ids=lambda p: name_of(p) or "__init__")
def test_nothing_of_torch_is_patched(path: Path) -> None:
    for node in ast.walk(tree_of(path)):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            targets = [node.target]
        for target in targets:
            if isinstance(target, ast.Attribute):
                owner = ast.unparse(target.value)
                assert owner.partition(".")[0] not in ("torch", "nn", "F", "einops", "safetensors"), (
                    ast.unparse(node)
                )
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
            assert ast.unparse(node.args[0]).partition(".")[0] not in ("torch", "nn", "F"), ast.unparse(node)


# -- the public surface ------------------------------------------------------------------------------------------------


def is_method(thing: Any) -> bool:
    return inspect.isclass(thing) and issubclass(thing, Method)


def test_the_public_names() -> None:
    assert peftlib.__all__ == sorted(peftlib.__all__)
    assert set(peftlib.__all__) == {
        # what is attached
        "Adapter", "BitFit", "FullFineTuning", "LoRA", "NewHead", "PTuningV1", "PTuningV2", "PartialFineTuning",
        "PrefixTuning", "PromptTuning", "TokenRows",
        # where and how
        "attach", "combine", "inspect", "load", "merged_state_dict", "route", "summary", "tunings", "use", "Tuning",
        "PeftlibError",
        # what it costs
        "MemoryPlan", "MemoryReport", "OutOfMemory", "ShardedOver", "estimate_memory", "explain_oom", "measure_memory",
        "plan_memory",
    }  # fmt: skip
    assert all(hasattr(peftlib, name) for name in peftlib.__all__)


@pytest.mark.parametrize("name", peftlib.__all__)
def test_public_names_are_documented(name: str) -> None:
    thing = getattr(peftlib, name)
    text = inspect.getdoc(thing)
    assert text
    first = text.split("\n\n")[0]
    assert first.endswith((".", ":", "``"))
    for own, member in vars(thing).items() if inspect.isclass(thing) else ():
        if inspect.isfunction(member) and not own.startswith("_") and not overrides(thing, own):
            assert inspect.getdoc(member), f"{name}.{own}"


@pytest.mark.parametrize("name", train.__all__)
def test_every_piece_of_the_trainer_has_an_example_that_runs(name: str) -> None:
    # the doctests of the package run with the tests
    assert doctest.DocTestParser().get_examples(inspect.getdoc(getattr(train, name)) or "")


def overrides(cls: type, name: str) -> bool:
    return any(name in vars(base) for base in cls.__mro__[1:])


PUBLIC_METHODS = [getattr(peftlib, n) for n in peftlib.__all__ if is_method(getattr(peftlib, n))]


@pytest.mark.parametrize("method", PUBLIC_METHODS)
def test_every_field_of_a_method_is_documented(method: type[Method]) -> None:
    documented = set()
    for cls in method.__mro__:
        arguments = re.search(r"Args:\n(.*?)(?:\n\s*\n|\Z)", cls.__doc__ or "", re.DOTALL)
        documented |= set(re.findall(r"^\s+(\w+):", arguments.group(1), re.MULTILINE)) if arguments else set()
    missing = {f.name for f in dataclasses.fields(method)} - documented  # type: ignore[arg-type]
    assert not missing


@pytest.mark.parametrize("method", PUBLIC_METHODS)
def test_methods_are_frozen_keyword_only_configurations_with_an_example(method: type[Method]) -> None:
    assert method.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert ">>>" in (method.__doc__ or "")
    positional = [f.name for f in dataclasses.fields(method) if not f.kw_only]  # type: ignore[arg-type]
    assert positional in ([], ["out_features", "bias"], ["ids"])


def test_each_method_is_a_file_of_its_own_and_found_by_its_name() -> None:
    assert len({m.__module__ for m in PUBLIC_METHODS}) == len(PUBLIC_METHODS)
    assert all(METHODS[m.__name__] is m for m in PUBLIC_METHODS)


def test_methods_are_final() -> None:
    for method in PUBLIC_METHODS:
        assert not [c for c in method.__subclasses__() if c.__module__.startswith("peftlib.")]


@pytest.mark.parametrize("path", FILES, ids=lambda p: name_of(p) or "__init__")
def test_every_file_states_its_idea(path: Path) -> None:
    text = ast.get_docstring(tree_of(path))
    assert text
    assert text.split("\n")[0].endswith((".", ":", ";", ","))
