"""What the documentation says of the tests is true."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_every_test_that_is_named_exists() -> None:
    named = [
        match for page in DOCUMENTS for match in re.findall(r"(?<!\w)(tests/[\w/]+\.py)(?:::(\w+))?", page.read_text())
    ]
    assert len(named) > 40
    for file, name in named:
        functions = {
            node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, ast.FunctionDef)
        }
        assert not name or name in functions, f"{file}::{name}"


def test_every_link_leads_somewhere() -> None:
    for page in DOCUMENTS:
        for target in re.findall(r"\]\(((?!http)[^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
