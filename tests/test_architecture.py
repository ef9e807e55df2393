"""The house rules that hold for every module: what it loads, what it imports, how it is written."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import advisor

PACKAGE = Path(advisor.__file__).parent
ROOT = PACKAGE.parent
MODULES = sorted(PACKAGE.rglob("*.py"))
MOST_LINES = 500

TORCH = ("torch", "transformers", "accelerate", "deepspeed")
HEAVY = (*TORCH, "pandas", "huggingface_hub", "numpy", "rich", "yaml", "pynvml")

RECOMMEND = 'advisor.recommend("Qwen2.5-1.5B", gpus=4, gpu="A100-80GB")'


def loaded_by(statement: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after *statement*."""
    script = (
        f"import json, sys; sys.path.insert(0, {str(ROOT)!r}); {statement}; "
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("statement", "unwanted"),
    [
        ("import advisor", HEAVY),
        ("import advisor.cli.main", HEAVY),
        ("import advisor.search.recommend", (*TORCH, "pandas", "huggingface_hub", "yaml", "rich", "pynvml")),
        (f"import advisor; {RECOMMEND}", (*TORCH, "pandas", "huggingface_hub", "yaml", "rich")),
        (
            'import advisor; advisor.estimate("gpt2", strategy="ddp", gpus=1, gpu="T4")',
            (*TORCH, "pandas", "huggingface_hub", "yaml", "rich"),
        ),
    ],
)
def test_nothing_is_loaded_before_it_is_used(statement: str, unwanted: tuple[str, ...]) -> None:
    loaded = loaded_by(statement)

    assert "advisor" in loaded
    assert sorted(loaded & set(unwanted)) == []


def test_a_module_that_is_loaded_is_seen() -> None:
    """The test above would notice."""
    assert {"numpy", "json"} <= loaded_by("import advisor.search.recommend")


@pytest.mark.skipif(find_spec("importlinter") is None, reason="import-linter is not installed")
def test_imports_point_downwards() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "Imports point downwards KEPT" in done.stdout


def test_every_name_of_the_interface_is_there_and_no_other() -> None:
    assert dir(advisor) == sorted(advisor.__all__)
    for name in advisor.__all__:
        assert getattr(advisor, name) is not None
    with pytest.raises(AttributeError, match="module 'advisor' has no attribute 'recomend'"):
        advisor.recomend  # noqa: B018 - reading it is the test


def test_the_functions_of_the_interface_are_those_of_their_modules() -> None:
    homes = {
        "compare": "search.compare",
        "estimate": "cost.estimate",
        "estimate_inference": "cost.inference",
        "largest_models": "search.limits",
        "launch_files": "launch.files",
        "limits": "search.limits",
        "rank_gpus": "search.gpu_types",
        "read_records": "validation.recorded",
        "recommend": "search.recommend",
        "validate": "validation.campaign",
    }

    for name, home in homes.items():
        assert getattr(advisor, name) is getattr(import_module(f"advisor.{home}"), name)
    assert set(advisor.__all__) == {*homes, "__version__"}


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_says_what_it_is_and_stays_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")

    assert ast.get_docstring(ast.parse(text)), "a module starts with a docstring"
    assert len(text.splitlines()) <= MOST_LINES
    assert path.stem not in ("utils", "helpers", "common", "misc")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_import_the_module_that_defines_a_name(path: Path) -> None:
    """``from advisor import …`` inside the package would go through the lazy interface."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom):
            assert node.module != "advisor"
            assert node.level == 0
        if isinstance(node, ast.Import):
            assert "advisor" not in {alias.name for alias in node.names}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_is_left_unfinished(path: Path) -> None:
    text = path.read_text(encoding="utf-8")

    assert [word for word in ("TODO", "FIXME", "XXX", "NotImplementedError") if word in text] == []


def test_every_folder_is_a_package() -> None:
    folders = {path.parent for path in MODULES}

    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_tests_mirror_the_package() -> None:
    """Each folder of tests is named after a folder of the package, or says what it holds the package against."""
    against = {"benchmarks", "notebooks", "published"}
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/__init__.py")}
    packages: set[Any] = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}

    assert folders - against == packages
