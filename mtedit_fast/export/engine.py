"""TensorRT plans from ONNX files: one code path over `tensorrt` and `tensorrt_rtx`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from .backends import Backend, load_backend
from .manifest import DamagedFile, Engine, Entry, File, Manifest, key_of, staged, verify
from .ports import Port, Profile

COMPATIBILITIES = ("none", "same_compute_capability", "ampere_plus")

_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64", "BOOL": "bool"}


def build_engine(
    directory: str | Path,
    name: str,
    *,
    backend: str = "tensorrt_rtx",
    sm: int | None = None,
    compatibility: str = "none",
    version_compatible: bool = False,
    console: Console | None = None,
) -> Engine:
    """Build the plan of an exported module, or keep the one that is there if its key says it is the same.

    The network is strongly typed: precision is that of the graph. Names, dtypes, shapes and profiles are compared with
    the manifest before the build, because a plan cannot be opened on a machine without a GPU.

    Args:
        directory, name: of a module that `export_module` has written with buckets.
        sm: compute capability, such as 80; default: the GPU that is here. tensorrt_rtx takes any it knows.
        compatibility: of tensorrt's plans: "none", this very GPU model; "same_compute_capability", e.g. H100 and H200;
            "ampere_plus", any from SM80 on: the wider, the fewer kernels to choose from, and the slower.
        version_compatible: of tensorrt's plans: later minor versions run it too; larger and slower.
        console: where progress is shown; None: nowhere.

    Raises:
        ImportError: the library is not installed.
        ValueError: no such module, no buckets, a target that the library cannot build for, a graph it refuses, or
            options that tensorrt_rtx, whose plans are portable anyway, does not have.
    """
    directory = Path(directory)
    library = load_backend(backend)
    sm = library.target(sm)
    _check_options(library, compatibility, version_compatible)
    manifest = Manifest.read(directory)
    entry = manifest.entry(name)
    if not entry.profiles:
        raise ValueError(
            f"buckets: expected at least one for {name}, got none; export it with --bucket BATCHxHEIGHTxWIDTH"
        )
    asked = Engine(File("", 0, ""), backend, library.version, sm, library.device, compatibility, version_compatible, "")
    key = key_of(entry, asked)
    if entry.engine is not None and entry.engine.key == key:
        try:
            verify(directory, entry.engine.file)
            return entry.engine
        except DamagedFile:
            pass  # build it again
    for file in entry.files:
        verify(directory, file)
    plan_name = f"{name}.plan"
    with staged(directory) as staging:
        timings = directory / f"timings-{backend}-{library.version}-sm{sm}.cache"
        plan = _Build(library, entry, sm, asked, console).run(directory / entry.files[0].name, name, timings)
        (staging / plan_name).write_bytes(plan)
        file = File.of(staging / plan_name)
    entry.engine = Engine(file, backend, library.version, sm, asked.device, compatibility, version_compatible, key)
    manifest.write(directory)
    return entry.engine


def _check_options(library: Backend, compatibility: str, version_compatible: bool) -> None:
    if compatibility not in COMPATIBILITIES:
        raise ValueError(f"compatibility: expected one of {', '.join(COMPATIBILITIES)}, got {compatibility!r}")
    if library.name == "tensorrt_rtx" and (compatibility != "none" or version_compatible):
        raise ValueError(
            "compatibility, version_compatible: expected the defaults with tensorrt_rtx, whose plans are finished on "
            "the GPU they run on; leave them out"
        )


class _Build:
    """One build; the library's objects live as long as it does."""

    def __init__(self, library: Backend, entry: Entry, sm: int, asked: Engine, console: Console | None):
        self.library, self.entry, self.sm, self.asked, self.console = library, entry, sm, asked, console
        self.messages: list[str] = []
        self.logger = _logger(library.trt, self.messages)

    def run(self, onnx: Path, name: str, timings: Path) -> memoryview:
        trt = self.library.trt
        builder = trt.Builder(self.logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, self.logger)
        if not parser.parse_from_file(str(onnx)):
            errors = "; ".join(dict.fromkeys(parser.get_error(i).desc() for i in range(parser.num_errors)))
            raise ValueError(f"{name}: {self.library.name} {self.library.version} cannot parse {onnx.name}: {errors}")
        check_network(network, self.entry)
        config = builder.create_builder_config()
        self.library.configure(config, self.sm)
        self._options(config)
        for profile in self.entry.profiles:
            config.add_optimization_profile(self._profile(builder, profile))
        cache = config.create_timing_cache(timings.read_bytes() if timings.is_file() else b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
        with _Progress(trt, self.console, f"{name} SM{self.sm}") as monitor:
            config.progress_monitor = monitor
            plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise ValueError(
                f"{name}: {self.library.name} {self.library.version} refused to build for SM{self.sm}: "
                f"{'; '.join(dict.fromkeys(self.messages)) or 'no reason given'}"
            )
        timings.write_bytes(memoryview(config.get_timing_cache().serialize()))
        return memoryview(plan)

    def _options(self, config: Any) -> None:
        trt = self.library.trt
        if self.asked.compatibility != "none":
            levels = trt.HardwareCompatibilityLevel
            config.hardware_compatibility_level = getattr(levels, self.asked.compatibility.upper())
        if self.asked.version_compatible:
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)

    def _profile(self, builder: Any, profile: Profile) -> Any:
        made = builder.create_optimization_profile()
        for port in self.entry.inputs:
            made.set_shape(port.name, *profile.shapes(port))
        for port in self.entry.inputs:
            expected = [tuple(shape) for shape in profile.shapes(port)]
            got = [tuple(shape) for shape in made.get_shape(port.name)]
            if got != expected:
                raise ValueError(f"{port.name}: expected shapes {expected} in profile {profile.name}, got {got}")
        return made


def check_network(network: Any, entry: Entry) -> None:
    """Names, order, dtypes and shapes of a parsed network are the manifest's; ValueError names one that is not."""
    _check_ports("input", entry.inputs, [network.get_input(i) for i in range(network.num_inputs)], exact=True)
    _check_ports("output", entry.outputs, [network.get_output(i) for i in range(network.num_outputs)], exact=False)


def _check_ports(kind: str, ports: tuple[Port, ...], tensors: list[Any], *, exact: bool) -> None:
    names = [tensor.name for tensor in tensors]
    if names != [port.name for port in ports]:
        raise ValueError(f"{kind}s: expected {[port.name for port in ports]}, got {names} in the parsed network")
    for port, tensor in zip(ports, tensors, strict=True):
        dtype = _DTYPES.get(tensor.dtype.name, tensor.dtype.name)
        expected = [-1 if isinstance(size, str) else size for size in port.shape]
        got = list(tensor.shape)
        # an output's fixed size may not be known before the shapes of the inputs are
        fits = (
            got == expected
            if exact
            else len(got) == len(expected) and all(e in (-1, g) or g == -1 for e, g in zip(expected, got, strict=True))
        )
        if dtype != port.dtype or not fits:
            raise ValueError(
                f"{kind} {port.name}: expected {port.dtype} {expected}, got {dtype} {got} in the parsed network"
            )


def _logger(trt: Any, messages: list[str]) -> Any:
    """Keeps errors for our own exception instead of printing."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                messages.append(message)

    return Logger()


class _Progress:
    """Builder phases as rich bars, gone when it is over."""

    def __init__(self, trt: Any, console: Console | None, title: str):
        self._trt, self._title = trt, title
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            console=console or Console(quiet=True),
            transient=True,
        )

    def __enter__(self) -> Any:
        bars, tasks, title = self._bars, {}, self._title
        base: Any = self._trt.IProgressMonitor
        bars.start()

        class Monitor(base):
            def __init__(self) -> None:
                base.__init__(self)

            def phase_start(self, name: str, parent: str | None, steps: int) -> None:
                tasks[name] = bars.add_task(name if parent else f"{title}: {name}", total=steps)

            def step_complete(self, name: str, step: int) -> bool:
                bars.update(tasks[name], completed=step + 1)
                return True

            def phase_finish(self, name: str) -> None:
                bars.remove_task(tasks.pop(name))

        return Monitor()

    def __exit__(self, *error: object) -> None:
        self._bars.stop()
