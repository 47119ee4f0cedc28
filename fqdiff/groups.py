"""Block groups written as text: ``12/345/6`` or ``1-2/3-5/6``."""

from fqdiff.errors import GroupsError

BLOCKS = (1, 2, 3, 4, 5, 6)
PLACES = ("stem", *map(str, BLOCKS), "head")  # every parameter is in one of them
HINT = "list each block once, e.g. --groups 12/345/6 or 1-2/3-5/6"
Groups = tuple[tuple[int, ...], ...]


def parse_groups(text: str) -> Groups:
    """The groups in ``text``, in the order written; every block in exactly one, or GroupsError naming the block."""
    groups = tuple(tuple(_blocks_of(part, text)) for part in text.split("/"))
    seen = [block for group in groups for block in group]
    for block in seen:
        if seen.count(block) > 1:
            where = "two groups" if sum(block in g for g in groups) > 1 else "one group twice"
            raise GroupsError(f"block {block} is in {where} of '{text}'", HINT)
    for block in BLOCKS:
        if block not in seen:
            raise GroupsError(f"block {block} is in no group of '{text}'", HINT)
    return groups


def _blocks_of(part: str, text: str) -> list[int]:
    """Blocks of one group: single digits and ranges ``a-b``."""
    if not part:
        raise GroupsError(f"an empty group in '{text}'", HINT)
    blocks: list[int] = []
    i = 0
    while i < len(part):
        first = _block(part[i], text)
        if part[i + 1 : i + 2] == "-":
            last = _block(part[i + 2 : i + 3], text)
            if last < first:
                raise GroupsError(f"the range {first}-{last} in '{text}' runs backwards", HINT)
            blocks.extend(range(first, last + 1))
            i += 3
        else:
            blocks.append(first)
            i += 1
        if part[i : i + 1] == ",":
            i += 1
    return blocks


def _block(character: str, text: str) -> int:
    if character not in "123456" or not character:
        raise GroupsError(f"'{character}' in '{text}' is no block", HINT)
    return int(character)


def format_groups(groups: Groups) -> str:
    """The text that :func:`parse_groups` reads back to ``groups``."""
    return "/".join("".join(str(block) for block in group) for group in groups)
