"""What every command shares: the common options, the store, where output goes, and how errors end.

Nothing here imports torch before a command's body runs.
"""

import functools
import inspect
import json
import os
import signal
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast, get_args, get_type_hints

import typer

from fqdiff.errors import ArtifactNotFound, ConfigError, FqdiffError, LineageError

if TYPE_CHECKING:
    import torch

    from fqdiff.context import Bar
    from fqdiff.pipeline import Runner, Step
    from fqdiff.store.manifest import Manifest
    from fqdiff.store.store import Store

COMMON = "Common options"
TOML_HINT = "a TOML file with one table per stage"
Config = TypeVar("Config")

StoreOption = Annotated[
    Path, typer.Option("--store", envvar="FQDIFF_STORE", help="Folder of the artifact store.", rich_help_panel=COMMON)
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.", rich_help_panel=COMMON)]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of everything random.", rich_help_panel=COMMON)]
NameOption = Annotated[
    str | None,
    typer.Option("--name", help="Name to give the result, usable wherever an id is.", rich_help_panel=COMMON),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", help="TOML file with one table per stage; flags override it.", rich_help_panel=COMMON),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.", rich_help_panel=COMMON)]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes.", rich_help_panel=COMMON)]
VerboseOption = Annotated[
    bool, typer.Option("--verbose", "-v", help="Also show times and memory.", rich_help_panel=COMMON)
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Show what would be made.", rich_help_panel=COMMON)]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Make it again even if it is there.", rich_help_panel=COMMON)
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=COMMON)]

COMMON_OPTIONS: dict[str, tuple[Any, Any]] = {
    "store": (StoreOption, Path("fqdiff-store")),
    "device": (DeviceOption, "auto"),
    "seed": (SeedOption, 0),
    "name": (NameOption, None),
    "config": (ConfigOption, None),
    "json": (JsonOption, False),
    "quiet": (QuietOption, False),
    "verbose": (VerboseOption, False),
    "dry_run": (DryRunOption, False),
    "force": (ForceOption, False),
    "debug": (DebugOption, False),
}
STORE_OPTIONS = ("store", "json", "quiet", "debug")
NOTHING_RANDOM = tuple(name for name in COMMON_OPTIONS if name not in ("seed", "device"))


@dataclass
class Session:
    """The common options of one command, and what is built from them."""

    store_path: Path
    device_name: str = "auto"
    seed: int = 0
    name: str | None = None
    config_path: Path | None = None
    as_json: bool = False
    quiet: bool = False
    verbose: bool = False
    dry_run: bool = False
    force: bool = False
    stopping: bool = False
    asks: bool = False

    # --- output ----------------------------------------------------------------------------------------------------

    def note(self, line: str) -> None:
        """One line on stderr, unless --quiet; from the first process only."""
        if not self.quiet and os.environ.get("RANK", "0") == "0":
            print(line, file=sys.stderr, flush=True)

    def result(self, data: dict[str, Any], text: Callable[[], str]) -> None:
        """The result on stdout: ``data`` as JSON, or ``text()`` for people."""
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(data, indent=1, default=str) if self.as_json else text(), flush=True)

    # --- what commands work with -----------------------------------------------------------------------------------

    @functools.cached_property
    def store(self) -> "Store":
        """The store; nothing is written before there is something to keep."""
        from fqdiff.store.store import Store

        return Store(self.store_path)

    @functools.cached_property
    def device(self) -> "torch.device":
        """The device asked for; ``auto`` takes CUDA, then MPS, then the CPU."""
        import torch

        available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        if self.device_name == "auto":
            name = next(d for d in ("cuda", "mps", "cpu") if available[d])
        elif available.get(self.device_name.split(":")[0], False):
            name = self.device_name
        else:
            have = ", ".join(d for d, there in available.items() if there)
            raise ConfigError(f"device '{self.device_name}' is not available", f"here: auto, {have}")
        if name == "cuda" and "LOCAL_RANK" in os.environ:
            name = f"cuda:{os.environ['LOCAL_RANK']}"
        return torch.device(name)

    @functools.cached_property
    def runner(self) -> "Runner":
        """Runs stages on the store with this session's device, progress bars and notes."""
        from fqdiff import distributed
        from fqdiff.context import Context
        from fqdiff.pipeline import Runner
        from fqdiff.store.store import check_name

        if self.name is not None:
            check_name(self.name)  # before any work is done
        distributed.start(self.device)
        context = Context(device=self.device, progress=self.progress, soft_stop=self.soft_stop)
        settings = read_settings(self.config_path) if self.config_path is not None else ""
        return Runner(self.store, context, self.note, " ".join(["fqdiff", *sys.argv[1:]]), self.force, settings)

    def make(
        self, step: "Step", facts: Mapping[str, object] | None = None, lines: Sequence[str] = ()
    ) -> "Manifest | None":
        """The artifact of ``step``, named if a name was asked for; with --dry-run what it would be is shown, and None.

        ``facts`` join what --dry-run shows with --json, ``lines`` what it shows people.
        """
        if self.dry_run:
            exists = self.store.find(step.kind, step.id) is not None
            recipe = {"kind": step.kind, "id": step.id, "exists": exists, "config": dict(step.recipe.config)}
            data = {**recipe, **(facts or {})}
            there = " (it is there)" if exists else ""
            self.result(data, lambda: "\n".join([f"would make {step.kind} {step.id}{there}", *lines]))
            return None
        manifest = self.runner.run(step)
        if self.name is not None:
            self.store.give_name(self.name, manifest)
        self.tell_cost(manifest)
        return manifest

    def tell_cost(self, manifest: "Manifest") -> None:
        """With --verbose, the time and memory that an artifact took."""
        if self.verbose:
            self.note(
                f"{manifest.kind} {manifest.id}: {manifest.seconds:.1f} s, peak {manifest.peak_memory / 2**20:.0f} MiB"
            )

    def resolve(self, ref: str | None, kinds: tuple[str, ...]) -> "Manifest":
        """The artifact that ``ref`` names; without one the latest of ``kinds``, and a note that says which."""
        if ref is not None:
            return self.store.resolve(ref, kinds)
        manifest = self.store.resolve("latest", kinds)
        names = [n for n, target in self.store.names().items() if target == (manifest.kind, manifest.id)]
        self.note(f"{manifest.kind}: the latest, {manifest.id}" + (f" ({', '.join(names)})" if names else ""))
        return manifest

    def settings(self, table: str, kind: type[Config], base: Mapping[str, object], /, **flags: object) -> Config:
        """A stage's config: flags that were given, over the TOML table, over ``base``, over the defaults."""
        return kind(**{**base, **self.given(table, kind, **flags)})

    def given(self, table: str, kind: type[Any], /, **flags: object) -> dict[str, Any]:
        """What is said of a stage: flags that were given, over the TOML table."""
        return {**self._from_file(table, kind), **{k: v for k, v in flags.items() if v is not None}}

    def from_file(self, table: str, key: str, example: Config) -> Config | None:
        """One value of the TOML file, of the type of ``example``; None where it is absent."""
        value = self.tables().get(table, {}).get(key)
        return None if value is None else cast("Config", _checked(f"{table}.{key}", value, example))

    def tables(self) -> dict[str, dict[str, object]]:
        """The TOML file, one table per stage; empty without one."""
        if self.config_path is None:
            return {}
        data = read_toml(self.config_path, TOML_HINT)
        for name, table in data.items():
            if name not in STAGE_TABLES or not isinstance(table, dict):
                raise ConfigError(f"'{name}' in {self.config_path} is no stage", f"tables: {', '.join(STAGE_TABLES)}")
        return data

    def _from_file(self, table: str, kind: type[Config]) -> dict[str, object]:
        outside = OUTSIDE_CONFIG.get(table, ())
        given = {key: value for key, value in self.tables().get(table, {}).items() if key not in outside}
        return checked_settings(kind, given, table, f"[{table}] of {self.config_path}")

    # --- progress and interruption ---------------------------------------------------------------------------------

    @contextmanager
    def progress(self, total: int, label: str, unit: str) -> "Iterator[Bar]":
        """A progress bar on stderr with rate and time left; off without a terminal, with --quiet and with --json."""
        from tqdm import tqdm

        hidden = True if self.quiet or self.as_json or os.environ.get("RANK", "0") != "0" else None
        with tqdm(total=total, desc=label, unit=unit, disable=hidden, smoothing=0.1, dynamic_ncols=True) as bar:
            yield _TqdmBar(bar)

    @contextmanager
    def soft_stop(self) -> "Iterator[Callable[[], bool]]":
        """While it lasts, the first Ctrl-C only asks the stage to stop after its step."""
        self.asks = True
        try:
            yield lambda: self.stopping
        finally:
            self.asks = False

    def interrupt(self, signum: int, frame: object) -> None:
        """Ctrl-C: at once, but for the first one during a stage that can stop with its state saved."""
        if not self.asks:
            raise KeyboardInterrupt
        if self.stopping and "RANK" not in os.environ:  # torchrun passes one Ctrl-C on twice
            raise KeyboardInterrupt
        if not self.stopping:
            self.stopping = True
            self.note("stopping after this step, with everything saved; Ctrl-C again stops at once")


class _TqdmBar:
    def __init__(self, bar: Any) -> None:
        self.bar = bar

    def update(self, n: int = 1) -> None:
        self.bar.update(n)

    def show(self, text: str) -> None:
        self.bar.set_postfix_str(text, refresh=False)


STAGE_TABLES = (
    "train", "fisher", "validate", "plan", "calibrate", "quantize", "reconstruct", "reconstruct-temporal", "activations",
    "temporal-scales", "activation-steps", "noise-correction", "sample", "classifier", "fid", "compare",
)  # fmt: skip
OUTSIDE_CONFIG = {"train": ("preset", "dataset", "image_size")}


def read_toml(path: Path, hint: str) -> dict[str, Any]:
    """The content of a TOML file. Raises ConfigError with ``hint`` where it cannot be read."""
    try:
        return tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", hint) from None


def read_settings(path: Path) -> str:
    """The text of a TOML file, which manifests keep: a command that names it can be given again without it."""
    from fqdiff.store.manifest import SETTINGS_LIMIT

    read_toml(path, TOML_HINT)
    content = path.read_text()
    if len(content) > SETTINGS_LIMIT:
        raise ConfigError(f"{path} has {len(content):,} characters", f"at most {SETTINGS_LIMIT:,} are read")
    return content


def checked_settings(kind: type[Any], given: Mapping[str, object], label: str, where: str) -> dict[str, object]:
    """``given`` values of a TOML table as settings of ``kind``. Raises ConfigError for unknown names and for other types.

    ``label`` is what messages call the table, ``where`` the table and its file.
    """
    known = {f.name: getattr(kind, f.name, None) for f in fields(kind)}
    hints = get_type_hints(kind)
    values: dict[str, object] = {}
    for key, value in given.items():
        if key not in known or key == "architecture":
            listed = ", ".join(k for k in known if k != "architecture")
            raise ConfigError(f"unknown setting '{key}' in {where}", f"known: {listed}")
        # An empty tuple does not tell what it could hold; its type does.
        example = (get_args(hints[key])[0](),) if known[key] == () else known[key]
        values[key] = _checked(f"{label}.{key}", value, example)
    return values


def _checked(name: str, value: object, default: object) -> object:
    """``value`` if it has the type of ``default``; whole numbers may stand for floats, lists of numbers for tuples."""
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if isinstance(default, tuple) and isinstance(value, list):
        return tuple(_checked(name, element, default[0]) for element in value)
    if type(value) is not type(default):
        raise ConfigError(f"{name} is {value!r}", f"a {type(default).__name__}, such as {default!r}")
    return value


def common(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the common options ``names`` (all without any) and a :class:`Session` built from them.

    Errors end here: one line and a hint on stderr, and the exit code that fits.
    """
    chosen = names or tuple(COMMON_OPTIONS)

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(function)
        extra = [
            inspect.Parameter(
                f"opt_{n}",
                inspect.Parameter.KEYWORD_ONLY,
                default=COMMON_OPTIONS[n][1],
                annotation=COMMON_OPTIONS[n][0],
            )
            for n in chosen
        ]
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in list(own.parameters.values())[1:]]

        @functools.wraps(function)
        def wrapper(**values: Any) -> None:
            options = {n: values.pop(f"opt_{n}", COMMON_OPTIONS[n][1]) for n in COMMON_OPTIONS}
            debug = options.pop("debug")
            renamed = {"store": "store_path", "device": "device_name", "config": "config_path", "json": "as_json"}
            session = Session(**{renamed.get(name, name): value for name, value in options.items()})
            previous = signal.signal(signal.SIGINT, session.interrupt)
            try:
                function(session, **values)
            except FqdiffError as error:
                if debug:
                    raise
                print(f"error: {error.message}" + (f"\nhint: {error.hint}" if error.hint else ""), file=sys.stderr)
                raise typer.Exit(error.exit_code) from None
            except KeyboardInterrupt:
                print("interrupted; the same command continues where it stopped", file=sys.stderr)
                raise typer.Exit(130) from None
            finally:
                signal.signal(signal.SIGINT, previous)
                _leave_process_group()

        wrapper.__signature__ = inspect.Signature([*parameters, *extra])  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in [*parameters, *extra]}
        return wrapper

    return decorate


def _leave_process_group() -> None:
    if "fqdiff.distributed" in sys.modules:
        sys.modules["fqdiff.distributed"].stop()


def only_input(session: Session, manifest: "Manifest", role: str) -> "Manifest":
    """The artifact that fills ``role`` in ``manifest``'s recipe."""
    found = manifest.input(role)
    source = session.store.find(found.kind, found.id) if found else None
    if source is None:
        gone = f"{found.kind} {found.id}" if found else f"its {role}"
        raise ArtifactNotFound(f"{manifest.kind} {manifest.id} was made from {gone}, which is gone", "make it again")
    return source


def of_checkpoint(session: Session, kind: str, checkpoint_id: str, ref: str | None) -> "Manifest":
    """The artifact of ``kind`` that ``ref`` names, or the latest, which was made from that checkpoint."""
    make = f"fqdiff {'calibrate' if kind == 'calibration' else kind} {checkpoint_id}"
    if ref is not None:
        named = session.store.resolve(ref, (kind,))
        source = named.input("checkpoint")
        if source is None or source.id != checkpoint_id:
            raise LineageError(f"{kind} {named.id} is not of checkpoint {checkpoint_id}", make)
        return named
    own = [m for m in session.store.manifests(kind) if (i := m.input("checkpoint")) and i.id == checkpoint_id]
    if not own:
        raise ArtifactNotFound(f"no {kind} of checkpoint {checkpoint_id}", make)
    said = [own[-1].recipe.config.get(name) for name in ("scheme", "source", "kind")]
    session.note(", ".join([f"{kind}: the latest of that checkpoint", *map(str, filter(None, said)), own[-1].id]))
    return own[-1]
