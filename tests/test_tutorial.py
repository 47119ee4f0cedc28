"""The tutorial's shell blocks run from top to bottom, and what the page shows is what they print."""

import importlib.util
import re
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parent.parent / "docs"
SMALL = "IMAGES=20 STEPS=3 EPOCHS=1"  # as the page says


def load_generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_tutorial", DOCS / "generate_tutorial.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATOR = load_generator()
PAGE = (DOCS / "tutorial.md").read_text()


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    found: list[str] = GENERATOR.run(PAGE, tmp_path_factory.mktemp("tutorial"), SMALL)
    return found


def same(shown: str, printed: str) -> bool:
    """Word by word; numbers with a point, which another processor may round otherwise, to two parts in a hundred."""
    a, b = shown.split(), printed.split()
    return len(a) == len(b) and all(x == y or _close(x, y) for x, y in zip(a, b, strict=True))


def _close(one: str, other: str) -> bool:
    try:
        return "." in one and float(one) == pytest.approx(float(other), rel=0.02)
    except ValueError:
        return False


def test_numbers_are_compared_as_such() -> None:
    assert same("predicted 0.01223;\n 1.00e-02 x", "predicted  0.01223; 1.01e-02 x")
    assert not same("a 1.00e-02", "a 1.10e-02")
    assert not same("1,188,065 bytes", "1,188,066 bytes")
    assert not same("a b", "a b c")


def test_the_blocks_run_in_order_and_print_what_the_page_shows(outputs: list[str]) -> None:
    """To the word up to where the number of images comes in; from there on, the same tables."""
    shown = GENERATOR.blocks(PAGE)
    assert len(shown) == len(outputs) >= 8
    smaller = False
    for (commands, expected), printed in zip(shown, outputs, strict=True):
        smaller = smaller or "$IMAGES" in commands
        if expected is None:
            continue
        assert expected.strip(), f"python docs/generate_tutorial.py: nothing is shown for {commands}"
        if not smaller:
            assert same(expected, printed), f"python docs/generate_tutorial.py: {commands}{printed}"
        assert table_heads(expected) == table_heads(printed)


def table_heads(output: str) -> list[str]:
    """The heads of the tables in ``output``: a line above one of dashes."""
    lines = [" ".join(line.split()) for line in output.splitlines()]
    return [head for head, below in pairwise(lines) if re.fullmatch(r"(-{3,} ?)+", below)]


def test_the_page_shows_no_path_of_the_machine_it_was_made_on() -> None:
    absolute = re.compile(r"(?<![\w.:/~-])/\w+/\w")
    assert absolute.search("look at /some/where") is not None
    assert absolute.search(PAGE) is None


def test_outputs_are_written_below_their_blocks() -> None:
    page = "```sh\na\n```\n\n```text\nold\n```\n\nwords\n\n```sh\nb\n```\n\n```python\nc\n```\n"
    assert GENERATOR.blocks(page) == [("a\n", "old\n"), ("b\n", None)]
    assert GENERATOR.with_outputs(page, ["new\n", "unseen\n"]) == page.replace("old", "new")
