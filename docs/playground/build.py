"""Bundles the playground into one file that needs no server, not even to be opened from a folder.

    python docs/playground/build.py [FILE]

Browsers load no modules from a folder, so each becomes a function in a classic script. FILE is
docs/_build/playground.html by default. A build of the documentation calls `bundle`, too, and has
the page link to it.
"""

import pathlib
import re
import sys

HERE = pathlib.Path(__file__).resolve().parent
IMPORT = re.compile(r'^import \{([^}]*)\} from "([^"]+)";\n', re.MULTILINE)
EXPORT = re.compile(r"^export (?=(?:async )?(?:function|const|class) (\w+))", re.MULTILINE)
# Nothing may be loaded: what the page needs is in it.
POLICY = (
    '<meta http-equiv="Content-Security-Policy" content="'
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:\">"
)


def main() -> None:
    default = HERE.parent / "_build" / "playground.html"
    path = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else default
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(bundle(), encoding="utf-8")
    print(path)


def bundle(home: str | None = None) -> str:
    """The page as one file, with a link to `home` if there is one."""
    modules: dict[pathlib.Path, str] = {}
    _add(HERE / "main.js", modules, ())
    script = '"use strict";\n' + "\n".join(modules.values())
    assert "</script" not in script
    page = (HERE / "index.html").read_text(encoding="utf-8")
    style = (HERE / "style.css").read_text(encoding="utf-8")
    for old, new in [
        ('<meta charset="utf-8">', f'<meta charset="utf-8">\n    {POLICY}'),
        ('<link rel="stylesheet" href="style.css">', f"<style>\n{style}</style>"),
        ('<script type="module" src="main.js"></script>', f"<script>\n{script}</script>"),
        ("<body>", f'<body data-home="{home}">' if home else "<body>"),
    ]:
        assert page.count(old) == 1, old
        page = page.replace(old, new)
    return page


def _add(path: pathlib.Path, modules: dict[pathlib.Path, str], above: tuple[pathlib.Path, ...]):
    """Adds a module, after those that it imports."""
    if path in modules:
        return
    assert path not in above, f"{path} imports itself, by way of {above}"
    text = path.read_text(encoding="utf-8")

    def take(match: re.Match[str]) -> str:
        source = (path.parent / match[2]).resolve()
        _add(source, modules, (*above, path))
        return f"const {{{match[1]}}} = {_name(source)};\n"

    body = IMPORT.sub(take, text)
    exported = ", ".join(match[1] for match in EXPORT.finditer(body))
    body = EXPORT.sub("", body)
    left = re.search(r"^(?:import|export)\b.*", body, re.MULTILINE)
    assert not left, f"{path}: write {left and left[0]!r} as the other modules do"
    modules[path] = f"const {_name(path)} = (() => {{\n{body}return {{ {exported} }};\n}})();\n"


def _name(path: pathlib.Path) -> str:
    return "$" + re.sub(r"\W", "_", str(path.relative_to(HERE).with_suffix("")))


if __name__ == "__main__":
    main()
