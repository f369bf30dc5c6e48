import pathlib
import runpy

project = "jdropout"
author = "The jdropout authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "jdropout"
exclude_patterns = ["_build"]
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nitpicky = False
default_role = "code"


def write_playground(app, exception):
    if exception is None and app.builder.format == "html":
        build = runpy.run_path(str(pathlib.Path(__file__).parent / "playground" / "build.py"))
        page = pathlib.Path(app.outdir) / "playground.html"
        page.write_text(build["bundle"]("index.html"), encoding="utf-8")


def setup(app):
    app.connect("build-finished", write_playground)
