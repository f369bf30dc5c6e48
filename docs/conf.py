"""How the documentation is built: `sphinx-build -W -q docs docs/_build`.

The build fails, beyond Sphinx's own warnings, if a code cell raises, if a link or a cross-reference
leads nowhere, or if a public name is on no page of the reference.
"""

import importlib
import inspect
import os
import pathlib
import pkgutil
import re
import runpy
from typing import Any

from docutils import nodes
from jupyter_client.manager import KernelManager
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util import logging

import jdropout

# Pages are executed on a CPU wherever they are built, so that they show the same everywhere.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
# Without this ipykernel 7 warns that what is sent to it is not encrypted.
if encryption := getattr(KernelManager, "transport_encryption", None):
    encryption.default_value = "auto"

project = "jdropout"
author = "The jdropout authors"
copyright = "The jdropout authors, Apache-2.0"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build", "jupyter_execute", "playground"]
nitpicky = True
# The types of the one alias: no inventory of another project is fetched, so none can be linked.
nitpick_ignore_regex = [("py:class", r"(collections|jax|numpy)\..*")]
default_role = "code"

html_theme = "sphinx_book_theme"
html_title = "jdropout"
html_static_path = ["_static"]
html_css_files = ["jdropout.css"]
html_show_sourcelink = False
html_theme_options = {
    "home_page_in_toc": False,
    "navbar_persistent": [],
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}

autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_attr_annotations = False
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"

myst_enable_extensions = ["attrs_inline", "colon_fence"]
myst_heading_anchors = 3

nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_merge_streams = True

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

MODULES = [
    "jdropout",
    *(
        f"jdropout.{module.name}"
        for module in pkgutil.iter_modules(jdropout.__path__)
        if not module.name.startswith("_")
    ),
]
PUBLIC = {
    f"{module}.{name}": getattr(importlib.import_module(module), name)
    for module in MODULES
    for name in importlib.import_module(module).__all__
}
CLASSES = {thing: name for name, thing in PUBLIC.items() if inspect.isclass(thing)}
DEFAULT = r"<(?:class|function) '?(?:\w+\.)*?(\w+)(?:\.<locals>\.\w+)?(?: at 0x\w+)?'?>"
SHORT = {name.removeprefix("jdropout."): name for name in PUBLIC if name.count(".") == 1}


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-signature", shorten_signature)
    app.connect("doctree-read", link_names)
    app.connect("env-check-consistency", find_undocumented)
    app.connect("build-finished", write_playground)


def shorten_signature(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, signature: str, returned: str
) -> tuple[str, str] | None:
    """Name defaults, and the type of a result if it is one of ours, as users know them."""
    if not signature:
        return None
    signature = re.sub(r", parent=<[^>]*>, name=None", "", signature)  # every linen module has them
    signature = re.sub(DEFAULT, r"\1", signature)
    if what not in ("function", "method") or returned:
        return signature, returned
    try:
        annotation = inspect.signature(thing, eval_str=True).return_annotation
    except (NameError, TypeError, ValueError):
        return signature, returned
    return signature, CLASSES.get(annotation, "") if inspect.isclass(annotation) else ""


def link_names(app: Sphinx, doctree: nodes.document) -> None:
    """Turn `jdropout.keys.site_key` and `dropout` in the text into links to the reference."""
    for literal in list(doctree.findall(nodes.literal)):
        name = literal.astext().partition("(")[0]
        name = SHORT.get(name, name)
        unlinkable = (nodes.reference, nodes.title, addnodes.pending_xref, addnodes.desc_signature)
        if name not in PUBLIC or any(isinstance(node, unlinkable) for node in parents(literal)):
            continue
        reference = addnodes.pending_xref(
            "",
            refdomain="py",
            reftype="obj",
            reftarget=name,
            refdoc=app.env.docname,
            refexplicit=True,
            refwarn=True,
        )
        literal.replace_self(reference)
        reference += literal


def parents(node: nodes.Node) -> list[nodes.Node]:
    return [] if node.parent is None else [node.parent, *parents(node.parent)]


def find_undocumented(app: Sphinx, env: Any) -> None:
    documented = {name for name, *_ in env.get_domain("py").get_objects()}
    for name in sorted(PUBLIC.keys() - documented):
        logging.getLogger(__name__).warning("%s is on no page of the reference", name)


def write_playground(app: Sphinx, exception: Exception | None) -> None:
    """Write the playground, which is not one of the pages, beside them."""
    if exception is None and app.builder.format == "html":
        build = runpy.run_path(str(pathlib.Path(app.srcdir, "playground", "build.py")))
        page = pathlib.Path(app.outdir, "playground.html")
        page.write_text(build["bundle"]("index.html"), encoding="utf-8")
