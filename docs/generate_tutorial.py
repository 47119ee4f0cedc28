"""Run the shell blocks of docs/tutorial.md from top to bottom, and write what they print below them.

    python docs/generate_tutorial.py            # minutes

tests/test_tutorial.py runs them too, with less to compute.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PAGE = Path(__file__).parent / "tutorial.md"
ROOT = PAGE.parent.parent
BLOCK = re.compile(r"```sh\n(?P<commands>.*?)```(?:\n\n```text\n(?P<output>.*?)```)?", re.DOTALL)
SETTINGS = re.compile(r"^IMAGES=\d+ STEPS=\d+ EPOCHS=\d+", re.MULTILINE)
END = "end of a block of the tutorial"


def blocks(page: str) -> list[tuple[str, str | None]]:
    """Commands of each block, and the output shown below it, if there is one."""
    return [(found["commands"], found["output"]) for found in BLOCK.finditer(page)]


def run(page: str, folder: Path, settings: str = "") -> list[str]:
    """What each block prints, all of them run by one shell in ``folder``. ``settings`` replaces the page's own."""
    tools = folder / ".bin"
    tools.mkdir()
    for name, started in (("fqdiff", "-m fqdiff"), ("python", "")):
        (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {started} "$@"\n')
        (tools / name).chmod(0o755)
    script = "\n".join(f"{commands}echo '{END}'" for commands, _ in blocks(page))
    if settings:
        script, count = SETTINGS.subn(settings, script)
        assert count == 1, "the page sets IMAGES, STEPS and EPOCHS in one place"
    own = {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "PWD": str(folder)}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FQDIFF_")} | own
    done = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", script],  # noqa: S607
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(
            f"the tutorial stopped with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        )
    return done.stdout.split(f"{END}\n")[:-1]


def with_outputs(page: str, outputs: list[str]) -> str:
    """``page`` with ``outputs`` in the place of those shown; blocks without one get none."""
    printed = iter(outputs)

    def filled(found: re.Match[str]) -> str:
        new = next(printed)
        shown = f"\n\n```text\n{new}```" if found["output"] is not None else ""
        return f"```sh\n{found['commands']}```{shown}"

    return BLOCK.sub(filled, page)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        text = PAGE.read_text()
        PAGE.write_text(with_outputs(text, run(text, Path(folder))))
