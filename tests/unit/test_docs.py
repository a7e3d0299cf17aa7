"""The documentation: its links lead somewhere, and the paths, commands and keys that it names exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from megatron_srpo.config import Config
from megatron_srpo.config.check import METRICS
from megatron_srpo.config.load import config_fields
from megatron_srpo.run import cli

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_srpo"
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/README.md"), *ROOT.glob("benchmarks/*.md")]
)
HISTORY = {"CHANGELOG.md", "design-notes.md", "RESULTS.md"}  # they also tell of files that no longer exist
CURRENT = [page for page in PAGES if page.name not in HISTORY]
FILE_NAME = re.compile(r"(?<![\w/.<…-])(?:\.\./)?[\w-]+(?:/[\w.-]+)+\.(?:py|sh|toml|md|example)(?:::\w+)?")
VERLS = {"data.train_files", "data.val_files", "data.max_response_length", "data.train_batch_size"}  # in a table
NO_KEYS = {"toml", "py", "md", "json"}  # run.toml is a file


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def code(page: Path) -> str:
    """The text of a page's code blocks and of what it puts in backticks."""
    text = page.read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```|^    (.+)$", text, re.M | re.S)
    return "\n".join([*("".join(block) for block in blocks), *re.findall(r"`([^`\n]+)`", text)])


def dead_links(page: Path) -> list[str]:
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            dead.append(target)
    return dead


def missing_files(page: Path) -> list[str]:
    """Files of this project that the page names and that do not exist, or that lack the symbol named after "::"."""
    roots = [page.parent, ROOT, PACKAGE, ROOT / "tests"]
    rooms = {folder.name for root in roots[1:] for folder in root.iterdir() if folder.is_dir()}
    missing = []
    for name in FILE_NAME.findall(code(page)):
        path, _, symbol = name.partition("::")
        if path.split("/")[0] not in rooms | {".."}:
            continue
        found = next((root / path for root in roots if (root / path).is_file()), None)
        if found is None or symbol not in found.read_text():
            missing.append(name)
    return missing


def unknown_commands(page: Path) -> list[str]:
    text = code(page)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    ours = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    unknown = [f"make {name}" for name in re.findall(r"\bmake ([a-z][a-z-]*)", text) if name not in targets]
    unknown += [name for name in re.findall(r"-m megatron_srpo ([a-z][a-z-]*)", text) if name not in ours]
    for module in re.findall(r"-m ((?:megatron_srpo|tools|benchmarks|examples|slurm)[\w.]*)", text):
        path = ROOT / module.replace(".", "/")
        if not path.with_suffix(".py").is_file() and not (path / "__init__.py").is_file():
            unknown.append(module)
    return unknown


def unknown_keys(page: Path) -> list[str]:
    """Words in the form section.key whose section the configuration has, and whose key it lacks."""
    keys = config_fields()
    sections = "|".join(Config.model_fields)
    found = re.findall(rf"(?<![\w./-])(?:--)?((?:{sections})\.(\w+))(?![\w/(])", code(page))
    return [key for key, leaf in found if key not in keys and leaf not in NO_KEYS and key not in VERLS]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_link_leads_somewhere(page):
    assert not dead_links(page)


@pytest.mark.parametrize("page", CURRENT, ids=named)
def test_what_a_page_names_exists(page):
    assert not [*missing_files(page), *unknown_commands(page), *unknown_keys(page)]


def test_the_index_lists_every_page():
    index = (ROOT / "docs/index.md").read_text()
    assert not [
        page.name for page in (ROOT / "docs").glob("*.md") if page.name != "index.md" and page.name not in index
    ]


def test_a_page_with_mistakes_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A title\n[a](absent.md) [b](#a-title) [c](#no-title)\n"
        "`core/absent.py` `core/disk.py::absent` `core/disk.py` `run.absent` `run.seed` `run.toml`\n"
        "```bash\nmake nothing\npython -m megatron_srpo fly\npython -m tools.absent\n```\n"
    )
    assert dead_links(page) == ["absent.md", "#no-title"]
    assert missing_files(page) == ["core/absent.py", "core/disk.py::absent"]
    assert unknown_commands(page) == ["make nothing", "fly", "tools.absent"]
    assert unknown_keys(page) == ["run.absent"]


METRIC = re.compile(rf"(?:{METRICS})(?:/[\w@<>]+)+")
METRIC_PLACES = ("algorithms", "batching", "losses", "mcore", "observe", "plan", "rollout", "run")


def metrics_of_the_code() -> set[str]:
    """Every metric that the package names, with <> for what an f-string fills in."""
    found = set()
    for file in (file for place in METRIC_PLACES for file in (PACKAGE / place).rglob("*.py")):
        nodes = list(ast.walk(ast.parse(file.read_text())))
        parts = {part for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
        found |= {name for node in nodes if node not in parts and METRIC.fullmatch(name := _text(node))}
    return found


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.JoinedStr):
        parts = [str(part.value) if isinstance(part, ast.Constant) else "<>" for part in node.values]
        return re.sub(r"^<>/(?=[a-z_]+(@<>)?$)", "eval/", "".join(parts))  # the prefix of an evaluation's values
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def test_the_glossary_explains_every_metric_of_the_code_and_no_other():
    cells = re.findall(r"^\| (.+?) \|", (ROOT / "docs/metrics.md").read_text(), re.M)
    named = {name for cell in cells for name in re.findall(r"`([^`]+)`", cell) if METRIC.fullmatch(name)}
    explained = {re.sub(r"<\w+>", "<>", name) for name in named}
    code = metrics_of_the_code() - {"eval/<>"}  # the prefix of the values of one kind
    patterns = [re.compile(re.escape(name).replace("<>", r"(?:\w+|<>)")) for name in explained]
    assert {name for name in code if not any(pattern.fullmatch(name) for pattern in patterns)} == set()
    assert explained <= code


PLAIN = re.compile(r"(?<![\w.])torchrun (?:--nproc|--master|…)")


def test_no_page_and_no_message_leads_to_the_launcher_that_hides_the_exit_code():
    texts = {page: page.read_text() for page in CURRENT}
    texts |= {file: file.read_text() for place in (PACKAGE, ROOT / "tools") for file in place.rglob("*.py")}
    assert [named(file) for file, text in texts.items() if PLAIN.search(text)] == []
