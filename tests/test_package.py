"""The package as a user gets it."""

import ast
import pathlib
import re

import jdropout
import jdropout.linen
import jdropout.nnx

ROOT = pathlib.Path(__file__).parent.parent
MODULES = list(pathlib.Path(jdropout.__file__).parent.glob("*.py"))


def test_public_names_are_exactly_all_and_have_docstrings_with_examples():
    for module in (jdropout, jdropout.nnx, jdropout.linen):
        for name in module.__all__:
            text = getattr(module, name).__doc__
            for section in ("Example:", "References:"):
                assert section in text, (module.__name__, name, section)
    public = {name for name in vars(jdropout) if not name.startswith("_")}
    assert public - {"linen", "nnx"} == set(jdropout.__all__)


def test_no_module_uses_private_jax():
    assert len(MODULES) > 5
    for path in MODULES:
        assert "jax._src" not in path.read_text(), path


def test_random_numbers_are_made_in_the_law_alone():
    for path in MODULES:
        if path.name != "_law.py":
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute):
                    assert ast.unparse(node) not in ("jax.random", "jax.extend.random"), path
                if isinstance(node, ast.Name):
                    assert node.id != "threefry2x32", path


def test_the_changelog_knows_the_version():
    assert f"## [{jdropout.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_readmes_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    names = {}
    for block in blocks:
        exec(block, names)
    assert names["y"].shape == (32, 128)
    assert names["attended"].shape == (2, 128, 8, 64)


def test_every_public_name_is_in_the_documentation():
    text = (ROOT / "docs" / "api.md").read_text()
    for module in (jdropout, jdropout.nnx, jdropout.linen):
        for name in module.__all__:
            assert f":: {module.__name__}.{name}\n" in text, name
