"""The site is complete: passes, options, ops, views, commands and results are on it; pages are reached."""

import dataclasses
import re

import planish.ir.views
import pytest
import typer
import yaml
from docs_helpers import DOCS, PAGES, ROOT, commands, fences
from generators import command_line, ops, pages, passes, results, targets
from generators.docstring import fields, markdown, table
from planish.cli import app
from planish.codegen import TARGETS
from planish.ir.ops.registry import DEFINITIONS
from planish.passes import Fact
from planish.passes.infrastructure import registry
from planish.passes.infrastructure.recipe import presets


@pytest.fixture(scope="module")
def generated():
    return pages()


@pytest.mark.parametrize("name", passes.own_passes())
def test_every_pass_has_a_page_with_all_it_takes(name, generated):
    page, description = generated[f"passes/{name}.md"], registry.describe(registry.find(name))
    assert f"[`{name}`]({name}.md)" in generated["passes/index.md"]
    for option in description.options:
        default = "**must be given**" if option.default is None else f"`{option.default}`"
        row = next(line for line in page.splitlines() if line.startswith(f"| `{option.name}` |"))
        assert default in row
        assert option.accepts in row
        assert option.doc, f"{name}: the option {option.name} has no line in the docstring"
    assert description.contract.value in page
    assert re.search(r"^    .*(→|←|=|minimise)", page, re.MULTILINE), "there is no equation, before → after"
    assert re.search("precondition|Exact: nothing is rewritten", page, re.IGNORECASE), (
        "there is no precondition"
    )


def test_families_have_no_pass_that_does_not_exist():
    assert {name for family in passes.FAMILIES.values() for name in family} == set(passes.own_passes())


def test_every_fact_has_a_section():
    text = (DOCS / "ir.md").read_text("utf-8")
    for fact in Fact:
        assert f"\n### {fact.value}\n" in text


def test_every_view_is_described():
    text = (DOCS / "ir.md").read_text("utf-8")
    views = [name for name in planish.ir.views.__all__ if name.islower()]
    assert views
    for name in views:
        assert f"`{name}(model)`" in text


def test_every_op_and_overload_is_there():
    page = ops.page()
    for definition in DEFINITIONS.values():
        assert f"\n## {definition.op_type}\n" in page
        assert f"| `{definition.overload or 'plain'}` |" in page
    for module in ops.modules():
        body = next(iter(module.DEFINITIONS.values())).body
        assert all(line.strip() in page for line in body.splitlines())


def test_every_target_and_option_is_there():
    page = targets.page()
    for name, kind in TARGETS.items():
        section = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
        rows = [line for line in section.splitlines() if line.startswith("| `")]
        assert [row.split("`")[1] for row in rows] == [field.name for field in dataclasses.fields(kind)]
        assert not any(row.endswith("|  |") for row in rows), "an option is not described"


def test_every_preset_can_be_chosen():
    text = (DOCS / "choosing.md").read_text("utf-8")
    assert set(re.findall(r"\| `([a-z0-9-]+)` \|$", text, re.MULTILINE)) == set(presets())


def leaves(words, command):
    if not hasattr(command, "commands"):
        yield words, command
        return
    for name, inner in command.commands.items():
        yield from leaves([*words, name], inner)


def test_every_command_and_option_is_there():
    page = command_line.page()
    for words, command in leaves(["planish"], typer.main.get_command(app)):
        section = re.split(r"\n##+ ", page.split(f"# {' '.join(words)}\n")[1])[0]
        for parameter in command.params:
            assert f"`{parameter.opts[0]}`" in section
            assert parameter.help in section


def test_commands_of_help_texts_are_understood():
    lines = [words for fence in fences(command_line.page(), "console") for words in commands(fence)]
    assert len(lines) > 20
    for words in lines:
        command, rest = typer.main.get_command(app), words
        while hasattr(command, "commands"):
            command, rest = command.commands[rest[0]], rest[1:]
        command.make_context(words[0], list(rest))  # an error of usage otherwise


def test_every_result_names_a_script_that_writes_it(generated):
    files = sorted((ROOT / "benchmarks" / "results").glob("*.md"))
    assert files
    for file in files:
        script = results.script(file)
        assert f"`python {script}`" in generated["results/index.md"]
        assert f"`python {script}`" in generated[f"results/{file.name}"]
        assert f"{file.stem}.md" in (ROOT / script).read_text("utf-8"), f"{script} does not write {file.name}"
        said = re.findall(r"benchmarks/\w+\.py", file.read_text("utf-8"))
        assert not said or str(script) in said


def navigation() -> list[str]:
    """The pages of the navigation; the entry of all passes is kept as it is."""

    class Loader(yaml.SafeLoader):
        """Reads mkdocs' own tags as nothing."""

    Loader.add_multi_constructor("!", lambda *_: None)
    found, entries = [], yaml.load((ROOT / "mkdocs.yml").read_text("utf-8"), Loader)["nav"]
    while entries:
        entry = entries.pop(0)
        entries += (
            list(entry.values()) if isinstance(entry, dict) else entry if isinstance(entry, list) else []
        )
        found += [entry] if isinstance(entry, str) else []
    return found


def test_no_page_is_an_orphan(generated):
    listed = navigation()
    written = [path.removeprefix("docs/") for path in PAGES if path.startswith("docs/")]
    reached = {f"passes/{name}.md" for names in passes.families().values() for name in names}
    reached |= {f"results/{name}" for name in re.findall(r"\]\((\w+\.md)\)", generated["results/index.md"])}
    assert set(listed) - {"passes/"} | reached == {*written, *generated}
    assert len(listed) == len(set(listed))


def test_the_readme_links_pages_that_exist():
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / "README.md").read_text("utf-8")):
        assert link.startswith("http") or (ROOT / link).exists(), link


def test_pages_load_nothing_from_the_network(generated):
    for path, text in {
        **generated,
        **{path: file.read_text("utf-8") for path, file in PAGES.items()},
    }.items():
        assert not re.search(r"!\[[^]]*\]\(https?:|<(script|img|link|iframe)\b", text), path


def test_docstrings_become_markdown():
    text = """Do ``x`` to W<bits>.

    More::

        a <b> ``c``

    Attributes:
        one: of ``two``,
            and three.

    End.
    """
    assert markdown(text) == "Do `x` to W&lt;bits>.\n\nMore:\n\n    a <b> ``c``\n\nEnd."
    assert fields(text) == {"one": "of `two`, and three."}
    assert table(("a", "b"), [("x|y", "two\nlines")]) == "| a | b |\n| --- | --- |\n| x\\|y | two lines |"
    assert table(("a",), []) == ""


def test_the_page_on_writing_a_pass_shows_the_files_themselves():
    text = (DOCS / "writing_a_pass.md").read_text("utf-8")
    shown = re.findall(r'^--8<-- "(.+):(.+)"$', text, re.MULTILINE)  # a formatter of Markdown may break these
    assert len(shown) == 5
    for file, section in shown:
        source = (ROOT / file).read_text("utf-8")
        assert f"# --8<-- [start:{section}]" in source
        assert f"# --8<-- [end:{section}]" in source
