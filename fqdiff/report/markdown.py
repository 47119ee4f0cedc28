"""A report as Markdown, for a README or a paper's appendix."""

import re

from fqdiff.report.data import Report
from fqdiff.report.tables import Table, tables
from fqdiff.report.words import title, verdict

SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~&$])")  # what begins markup somewhere in a line


def markdown(report: Report) -> str:
    """Verdict, tables, what they rest on, and the commands."""
    value = report.comparison
    commands = commands_text(report)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", commands)), default=2))
    parts = [
        f"## {escape(title(report))}",
        "\n".join(f"- {escape(line)}" for line in verdict(report)),
        *(f"### {escape(table.title)}\n\n{markdown_table(table)}" for table in tables(report)),
        escape(
            f"N = {value.n:,} images of each, seed {value.seed}; {value.level:.0%} intervals from {value.resamples:,} resamples; "
            f"features {value.features}, sha256 {value.features_sha256[:16]}; real images: {value.reference}; "
            f"{f'sampler runs: {value.sampler}; ' if value.sampler else ''}comparison {report.id}."
        ),
        f"{max(fence, '```', key=len)}sh\n{commands}\n{max(fence, '```', key=len)}",
    ]
    return "\n\n".join(parts)


def commands_text(report: Report) -> str:
    """The commands, one a line; below one that was given a settings file, as comments, what was in it.

    Files of one content are written out once. What is not printable is not printed.
    """
    lines, first = [], dict[str, str]()
    for command, settings in report.commands:
        lines.append(_printable(command))
        if not settings.strip():
            continue
        if settings in first:
            lines.append(f"#   its file of settings: that of {_printable(first[settings])}")
            continue
        first[settings] = command
        lines += ["#   its file of settings:", *(f"#     {_printable(line)}" for line in settings.strip().splitlines())]
    return "\n".join(lines)


def _printable(line: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in line)


def markdown_table(table: Table) -> str:
    """One pipe table, numbers to the right."""
    lines = [table.header, ["---", *("---:" for _ in table.header[1:])]]
    rows = [[escape(text) for text in table.header], lines[1], *([escape(c.text) for c in row] for row in table.rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def escape(text: str) -> str:
    """``text`` on one line, as it is read and not as markup."""
    return SPECIAL.sub(r"\\\1", " ".join(text.split()))
