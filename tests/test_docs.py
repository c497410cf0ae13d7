"""Every command in README.md, docs/*.md and the bundles' READMEs, checked against the code that it would run.

Here nothing is executed: config files, config ids, commands, arguments, make targets and paths have to exist, which is
what goes stale, and a mistake is named without running anything. test_docs_run.py runs the commands.
"""

from __future__ import annotations

import inspect
import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import monai.bundle
import pytest
from monai.bundle import ConfigParser
from tsfm.__main__ import commands as tsfm_commands
from tsfm_tools.release.release import PINS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("bundles/*/docs/*.md")])
RUN_OPTIONS = {"config_file", "meta_file", "logging_file", "tracking", "args_file", "run_id", "init_id", "final_id"}
MONAI_LABEL = {  # of monailabel 0.8.5
    "apps": {"--download", "--name", "--output", "--prefix"},
    "datasets": {"--download", "--name", "--output", "--prefix"},
    "start_server": {"--app", "--studies", "--conf", "--host", "--port", "--log_config", "--verbose"},
}
SHELL = {
    "cd",
    "cat",
    "cp",
    "mv",
    "mkdir",
    "rm",
    "ls",
    "unzip",
    "sha256sum",
    "curl",
    "git",
    ".",
    "source",
    "export",
    "pip",
}


def commands(page: Path) -> Iterator[tuple[Path, list[str]]]:
    """Every command of a page's bash blocks with the folder it runs in: a `cd` holds until the next heading."""
    home = page.parents[1] if page.parent.name == "docs" and page.parents[2].name == "bundles" else ROOT
    folder, fence = home, ""
    for line in re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8")).splitlines():
        if line.startswith("```"):
            fence = "" if fence else line[3:].strip() or "text"
        elif line.startswith("#") and not fence:
            folder = home
        elif fence == "bash" and line.strip() and not line.startswith("#"):
            words = shlex.split(line, comments=True, posix=True)
            for joined, part in itertools.groupby(words, lambda word: word in ("&&", "|", ";", ">")):
                command = list(part)
                if joined or not command:
                    continue
                while command and re.fullmatch(r"[A-Z_]+=.*", command[0]):
                    command.pop(0)
                if command and command[0] == "cd":
                    folder = (folder / command[1]).resolve()
                if command:
                    yield folder, command


def problems(folder: Path, command: list[str]) -> list[str]:
    """What would go wrong with a command in `folder`; empty if nothing is known to."""
    program = Path(command[0]).name or command[0]
    if program == "torchrun":
        return problems(folder, ["python", *command[command.index("-m") :]])
    if program in ("python", "python3"):
        return _python(folder, command[1:])
    if program == "make":
        return _make(command[1:])
    if program == "monailabel":
        known = MONAI_LABEL.get(command[1])
        flags = [word for word in command[2:] if word.startswith("--")]
        return [f"monailabel has no {command[1]}"] if known is None else [f for f in flags if f not in known]
    if program not in SHELL:
        return [f"unknown program {program}"]
    if program == "cd":
        return [] if not _ours(folder) or folder.is_dir() else [f"no folder {folder}"]
    return [f"no file {word}" for word in command[1:] if _names_a_source(word) and not (folder / word).exists()]


def _python(folder: Path, words: list[str]) -> list[str]:
    if words[:2] == ["-m", "monai.bundle"]:
        return _bundle(folder, words[2], words[3:])
    if words[:2] == ["-m", "tsfm"]:
        return _tsfm(folder, words[2], words[3:])
    if words[0] == "-m":
        return [] if words[1] in ("venv", "pytest", "zipfile", "pip") else [f"unknown module {words[1]}"]
    if words[0] == "-c":
        compile(words[1], "command", "exec")
        return []
    script = folder / words[0]
    if not script.is_file():
        return [f"no script {words[0]}"]
    text = script.read_text(encoding="utf-8")
    return [f"{words[0]} has no {w}" for w in words[1:] if w.startswith("--") and w.split("=")[0] not in text]


def _bundle(folder: Path, name: str, words: list[str]) -> list[str]:
    function = getattr(monai.bundle, name, None)
    if function is None:
        return [f"monai.bundle has no {name}"]
    positional, options = _arguments(words)
    known = RUN_OPTIONS if name == "run" else set(inspect.signature(function).parameters)
    listed = options.get("config_file", "[]")
    files = re.findall(r"[^\[\]',\s]+", listed)
    missing = [f"no config file {file}" for file in files if not (folder / file).is_file()]
    if missing or not _ours(folder):
        return missing if _ours(folder) else []
    parser = ConfigParser()
    parser.read_config([str(folder / file) for file in files])
    ids = [key for key in options if key not in known] + (positional if name == "run" else [])
    return [f"{listed} has no id {key}" for key in ids if key not in parser]


def _tsfm(folder: Path, name: str, words: list[str]) -> list[str]:
    if name not in tsfm_commands():
        return [f"python -m tsfm has no {name}"]
    positional, options = _arguments(words)
    try:
        inspect.signature(tsfm_commands()[name]()).bind(*positional, **options)
    except TypeError as error:
        return [f"python -m tsfm {name}: {error}"]
    values = [*positional, *(value for key, value in options.items() if "output" not in key)]
    sources = [word for word in values if _names_a_source(word) and _ours(folder)]
    return [f"no file {word}" for word in sources if not (folder / word).exists()]


def _make(words: list[str]) -> list[str]:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    found = []
    for word in words:
        name, is_variable, _ = word.partition("=")
        pattern = rf"^{name} \??= " if is_variable else rf"^{name}:"
        if not re.search(pattern, text, re.MULTILINE):
            found.append(f"Makefile has no {name}")
    return found


def _arguments(words: list[str]) -> tuple[list[str], dict[str, str]]:
    """Positional words, and the options as Fire reads them."""
    positional, options = [], {}
    words = list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            positional.append(word)
            continue
        key, joined, value = word[2:].partition("=")
        is_flag = not joined and (not words or words[0].startswith("--"))
        options[key] = value if joined else "True" if is_flag else words.pop(0)
    return positional, options


def _ours(folder: Path) -> bool:
    """Is it a folder of the repository, and not of the reader's or of a release?"""
    return folder.is_relative_to(ROOT) and not folder.is_relative_to(ROOT / "dist")


def _names_a_source(word: str) -> bool:
    """Does a word name a file of the repository? Weights, outputs and absolute paths are the reader's."""
    is_made = word.endswith((".pt", ".safetensors")) or "*" in word
    is_made |= word.startswith("docs/") and word.removeprefix("docs/") in PINS  # a release brings them
    return not is_made and word.startswith(("bundles/", "configs/", "docs/", "custom/", "benchmarks/", "requirements"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_the_commands_of_a_page_name_exists(page):
    found = [(shlex.join(command), problems(folder, command)) for folder, command in commands(page)]
    assert not [(command, wrong) for command, wrong in found if wrong]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_pictures_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    missing = [link for link in links if link and "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_the_pages_hold_the_commands_that_matter():
    text = [shlex.join(command) for page in PAGES for _, command in commands(page)]
    for wanted in (
        "make demo",
        "make test",
        "monai.bundle run",
        "-m tsfm release",
        "-m tsfm gate",
        "monailabel start_server",
    ):
        assert any(wanted in line for line in text), wanted


STALE = [
    ("bundles/tsfm_pretrain", "python -m monai.bundle run --config_file configs/trian.json"),
    ("bundles/tsfm_pretrain", "python -m monai.bundle run --config_file configs/train.json --no_such_id 3"),
    ("bundles/tsfm_pretrain", "python -m monai.bundle run no_such_run --config_file configs/train.json"),
    ("bundles/tsfm_pretrain", "torchrun --nproc_per_node=2 -m monai.bundle run --config_file configs/gone.json"),
    ("bundles/tsfm_pretrain", "python -m monai.bundle exports --config_file configs/inference.json"),
    (".", "python -m tsfm describe --checkpiont x"),
    (".", "python -m tsfm segment x"),
    (".", "python -m tsfm release --bundle_dir bundles/tsfm_gone --checkpoint x.pt --output_dir dist"),
    (".", "python benchmarks/gone.py"),
    (".", "make tset"),
    (".", "make test PYHTON=python3"),
    (".", "cd bundles/gone"),
    (".", "monailabel start_server --aap apps/monaibundle"),
    (".", "pytohn -m tsfm gate"),
]


def test_a_stale_command_is_found():
    for folder, line in STALE:
        start = (ROOT / folder).resolve()
        command = shlex.split(line)
        assert problems((start / command[1]) if command[0] == "cd" else start, command), line
