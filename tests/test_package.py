"""The package as a user gets it."""

import ast
import pathlib
import re

import flax.nnx

import jdropout
import jdropout.by_position
import jdropout.equinox
import jdropout.keys
import jdropout.linen
import jdropout.nnx
import jdropout.schedules
import jdropout.testing
import jdropout.uncertainty

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = pathlib.Path(jdropout.__file__).parent
MODULES = {path: ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
PUBLIC = (
    jdropout,
    jdropout.by_position,
    jdropout.equinox,
    jdropout.keys,
    jdropout.linen,
    jdropout.nnx,
    jdropout.schedules,
    jdropout.testing,
    jdropout.uncertainty,
)


def test_public_names_are_exactly_all_and_have_docstrings_with_examples():
    for module in PUBLIC:
        for name in module.__all__:
            text = getattr(module, name).__doc__
            if name == "Schedule":  # a type
                continue
            for section in ("Example:", "References:"):
                assert section in text, (module.__name__, name, section)
    public = {name for name in vars(jdropout) if not name.startswith("_")}
    submodules = {module.__name__.rpartition(".")[-1] for module in PUBLIC[1:]}
    assert public - submodules == set(jdropout.__all__)


def test_no_module_uses_private_jax():
    assert len(MODULES) > 5
    for path in MODULES:
        assert "jax._src" not in path.read_text(), path


def test_random_numbers_are_made_in_the_laws_alone():
    """Elsewhere keys are taken apart and put together, no numbers or children drawn from them."""
    conversions = {f"jax.random.{name}" for name in ("key_data", "key_impl", "wrap_key_data")}
    # Keys for a part of a batch derive children, and JAX's own numbers, as their originals do.
    kind = {f"jax.random.{name}" for name in ("bits", "fold_in", "key", "split")}
    kind |= conversions | {"jax.extend.random.define_prng_impl"}
    for path, tree in MODULES.items():
        if path.name in ("_law.py", "_strata.py"):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and "random" in ast.unparse(node.value):
                known = kind if path.name == "_key_kinds.py" else conversions
                assert ast.unparse(node) in known, (path, ast.unparse(node))
            if isinstance(node, ast.Name) and node.id == "threefry2x32":
                assert path == PACKAGE / "keys.py", path


def test_imports_form_no_circle():
    names = {path: module_name(path) for path in MODULES}
    known = set(names.values())
    imports = {
        name: imported(MODULES[path], known) - {name, "jdropout"} for path, name in names.items()
    }
    assert len(imports) > 60
    while imports:  # takes away what imports nothing that is left
        leaves = {name for name, needed in imports.items() if not needed & set(imports)}
        assert leaves, imports
        imports = {name: needed for name, needed in imports.items() if name not in leaves}


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def imported(tree, known):
    """The modules of this package that a file imports, where Python runs its import statements."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            both = {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
            submodules = both & known - {node.module}
            found |= submodules or both & known
    return found


def test_every_error_says_what_to_do():
    """After what is wrong: a second sentence, or something after a colon."""
    count = 0
    for path, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                if not isinstance(node.exc.args[0], ast.JoinedStr | ast.Constant):
                    continue  # a message that is made elsewhere
                count += 1
                message = ast.unparse(node.exc.args[0])
                assert re.search(r"[.:;](?: |\\n)\S", message), (path.name, node.lineno, message)
    assert count > 100


def test_the_changelog_knows_the_version():
    assert f"## [{jdropout.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_readmes_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    names = {}
    try:
        for block in blocks:
            exec(block, names)
        assert flax.nnx.Dropout is jdropout.nnx.Dropout
    finally:
        jdropout.nnx.uninstall()
    assert names["y"].shape == (32, 128)


def test_every_public_name_is_in_the_documentation():
    text = "".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))
    for module in PUBLIC:
        for name in module.__all__:
            assert f":: {module.__name__}.{name}\n" in text, name


def test_every_pitfall_names_a_test_that_exists():
    text = (ROOT / "docs" / "pitfalls.md").read_text()
    rows = re.findall(r"^\| (\d+) \|.*\| `(tests/[\w/]+\.py)::(\w+)` \|$", text, re.MULTILINE)
    assert [int(number) for number, _, _ in rows] == list(range(1, 26))
    for _, file, name in rows:
        names = {
            node.name
            for node in ast.walk(ast.parse((ROOT / file).read_text()))
            if isinstance(node, ast.FunctionDef)
        }
        assert name in names, (file, name)
