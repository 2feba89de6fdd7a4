"""What mkdocs needs beside its configuration: files from outside docs/, and docstrings."""

import ast
import os
import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]

_FENCED = re.compile(r"^(```+|~~~+).*?^\1\s*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<=\]\()(?!\w+:)([^()#\s]+)")
_PAGE = re.compile(r"(?P<tick>`?)\bdocs/(?P<page>[\w/]+\.md)(?P=tick)")
_SHARED = re.compile(r"^ {4}((?:\w+,\s+)+\w+)(:.*(?:\n {5,}.*)*)", re.MULTILINE)


def _prose(markdown: str) -> str:
    """The text of a page, without its blocks of code."""
    return _FENCED.sub("", markdown)


def _target(source: str, link: str) -> str:
    """The path in the repository to which a link in the file `source` of the repository leads."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def _exists(path: str) -> bool:
    return not path.startswith("..") and (ROOT / path).exists()


def _on_site(path: str) -> str:
    """The place in the site of a file of the repository; Markdown becomes a page."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path == "README.md":
        return "index.md"
    if (ROOT / path).is_dir():
        return f"{path}/index.md"
    return f"{path}.md" if path.endswith(".py") else path


def _in_repository(file: File) -> str:
    """Undo `_on_site`; of the page of a folder, its place is enough."""
    if file.generated_by is None:
        return f"docs/{file.src_uri}"
    return file.src_uri.removesuffix(".md") if file.src_uri.endswith(".py.md") else file.src_uri


def _added(config: MkDocsConfig, path: str) -> File:
    """A file of the site made of one of the repository; of code and folders, a page shows them."""
    outside: dict[str, Any] = {"abs_src_path": str(ROOT / path)}
    if (ROOT / path).is_dir():
        names = sorted(file.name for file in (ROOT / path).iterdir() if file.is_file())
        outside = {
            "content": "\n".join([f"# {path}\n", *(f"- [{name}]({name})" for name in names)])
        }
    elif path.endswith(".py"):
        code = (ROOT / path).read_text()
        head = "---\nsearch:\n  exclude: true\n---\n"
        outside = {"content": f"{head}# {path}\n\n~~~~~~python\n{code}~~~~~~\n"}
    inclusion = InclusionLevel.INCLUDED if path == "CHANGELOG.md" else InclusionLevel.NOT_IN_NAV
    return File.generated(config, _on_site(path), inclusion=inclusion, **outside)


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the files outside docs/ to which pages link, those to which these link, and so on."""
    files.append(_added(config, "CHANGELOG.md"))
    pages = list(files.documentation_pages())
    for page in pages:
        for link in _LINK.findall(_prose(page.content_string)):
            path = _target(_in_repository(page), link)
            outside = _exists(path) and not f"{path}/".startswith("docs/")
            if outside and files.get_file_from_path(_on_site(path)) is None:
                file = _added(config, path)
                files.append(file)
                if file.is_documentation_page():
                    pages.append(file)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to files outside docs/ to their places in the site; others stay as they are."""

    def lead(link: re.Match[str]) -> str:
        path = _target(_in_repository(page.file), link[0])
        if not _exists(path):
            return link[0]  # --strict refuses it
        return os.path.relpath(_on_site(path), posixpath.dirname(page.file.src_uri) or ".")

    parts, end = [], 0
    for block in _FENCED.finditer(markdown):
        parts += [_LINK.sub(lead, markdown[end : block.start()]), block[0]]
        end = block.end()
    return "".join([*parts, _LINK.sub(lead, markdown[end:])])


class Docstrings(griffe.Extension):
    """Docstrings as the site shows them."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Take the docstring of a property that a function makes, link pages, part entries."""
        value = getattr(obj, "value", None)
        if obj.docstring is None and isinstance(value, griffe.ExprCall):
            for text in filter(None, map(_text, value.arguments)):
                if text.endswith("."):  # the others are names
                    obj.docstring = griffe.Docstring(text, parent=obj)
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = _PAGE.sub(_titled, _SHARED.sub(_parted, text))


def _text(argument: Any) -> str | None:
    """The string that an argument is; None if it is something else."""
    try:
        value = ast.literal_eval(str(argument))
    except (SyntaxError, ValueError):
        return None
    return value if isinstance(value, str) else None


def _titled(page: re.Match[str]) -> str:
    """A link, from a page in docs/api, to a page that a docstring names by its path."""
    path = ROOT / "docs" / page["page"]
    title = re.search(r"^# (.*)$", path.read_text(), re.MULTILINE) if path.exists() else None
    return f"[{page['page'] if title is None else title[1]}](../{page['page']})"


def _parted(entry: re.Match[str]) -> str:
    """An entry for each of the arguments, or errors, that a docstring describes together."""
    return "\n".join(f"    {name}{entry[2]}" for name in re.split(r",\s+", entry[1]))
