"""The rooms of the package: what may import what, and how large a file may grow."""

import ast
import os
from collections import defaultdict

import pytest

CUSTOM = os.path.join(os.path.dirname(__file__), os.pardir, "custom")
ROOT = {"console", "labels", "errors", "files", "names", "schema", "snomed", "options"}
LEFT_OF = {
    "cases": set(),
    "preparation": {"cases"},
    "patches": {"preparation"},
    "network": {"patches"},
    "training": {"network"},
    "planning": {"training"},
    "inference": {"network"},
    "evaluation": {"inference"},
}
"""Room -> the rooms directly to its left; what is left of these is allowed too."""


def allowed(room):
    """The rooms that `room` may import, itself included."""
    found = {room, "_version"}
    for left in LEFT_OF.get(room, ()):
        found |= allowed(left)
    return found | ROOT


def modules(package):
    """(dotted name, path) of every module of a package."""
    root = os.path.join(CUSTOM, package)
    for folder, _, files in os.walk(root):
        for file in sorted(files):
            if file.endswith(".py"):
                path = os.path.join(folder, file)
                yield os.path.relpath(path, CUSTOM)[:-3].replace(os.sep, ".").removesuffix(".__init__"), path


def imports(name, path):
    """Modules of tsfm and tsfm_tools that a module imports, anywhere in its text, as absolute names."""
    with open(path, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    package = name.split(".") if path.endswith("__init__.py") else name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0].startswith("tsfm"))
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module.split(".")[0] in ("tsfm", "tsfm_tools"):
                inside = [f"{module}.{alias.name}" for alias in node.names]
                known = {found for found, _ in modules(module.split(".")[0])}
                yield from ({full if full in known else module for full in inside})


def test_no_module_imports_a_room_to_its_right():
    wrong = []
    for name, path in modules("tsfm"):
        room = name.split(".")[1] if "." in name else "tsfm"
        if room in ("tsfm", "__main__", *ROOT):
            continue
        for target in imports(name, path):
            if target != "tsfm" and target.split(".")[1] not in allowed(room):
                wrong.append(f"{name} imports {target}")
    assert not wrong


def test_the_package_never_imports_the_tools():
    assert not [
        f"{name} imports {target}"
        for name, path in modules("tsfm")
        for target in imports(name, path)
        if target.startswith("tsfm_tools")
    ]


def test_no_modules_import_each_other_in_a_circle():
    graph = defaultdict(set)
    for package in ("tsfm", "tsfm_tools"):
        for name, path in modules(package):
            graph[name] |= {target for target in imports(name, path) if target not in ("tsfm", "tsfm_tools", name)}
    done, open_ = set(), []

    def visit(name):
        assert name not in open_, " -> ".join([*open_[open_.index(name) :], name])
        if name not in done:
            open_.append(name)
            for target in sorted(graph[name]):
                visit(target)
            done.add(open_.pop())

    for name in sorted(graph):
        visit(name)


@pytest.mark.parametrize("package", ["tsfm", "tsfm_tools"])
def test_every_file_is_read_in_one_sitting_and_every_room_says_what_it_is(package):
    for name, path in modules(package):
        with open(path, encoding="utf-8") as file:
            text = file.read()
        assert text.count("\n") <= 350, f"{name} has {text.count(chr(10))} lines; at most 350"
        doc = ast.get_docstring(ast.parse(text))
        assert doc, f"{name} has no docstring"
        if path.endswith("__init__.py"):
            assert len(doc.split(". ")) >= 2 or len(doc.split(".\n")) >= 2, (
                f"{name}: what enters, what leaves, what it must not know"
            )
