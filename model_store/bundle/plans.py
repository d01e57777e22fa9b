"""Plans that travel in a bundle: what TensorRT made of its network, for one version of it and one GPU architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kernels.gpu.tensorrt_build import Settings, build, plan_name
from model_store.bundle.files import MANIFEST, NETWORK, read_bundle, sha256
from model_store.bundle.manifest import FileEntry, Manifest


def add_plans(
    folder: Path,
    settings: Settings,
    version: str,
    architectures: Sequence[str],
    built: Callable[[str, int], None],
    timings: Mapping[str, bytes] | None = None,
) -> list[str]:
    """Build a bundle's plans into its folder; the manifest lists them last: a crash leaves the bundle as it was.

    Args:
        folder: of a bundle that is not published yet.
        settings: what to build with; its architectures are not read.
        version: of the library.
        architectures: such as `8.9`, one plan each.
        built: told every plan's name and size.
        timings: files of another bundle, of whose timing caches the builds learn; TensorRT alone has them.

    Returns:
        The plans' names.

    Raises:
        BundleError: the bundle cannot be read.
        EngineError: the library does not build the network.
    """
    bundle = read_bundle(folder)
    known = {**(timings or {}), **bundle.files}
    plans: dict[str, bytes] = {}
    caches: dict[str, bytes] = {}
    for architecture in architectures:
        target = Settings(settings.library, settings.half, architectures=(architecture,))
        name = plan_name(settings.library, version, f"sm_{architecture.replace('.', '')}", settings.half)
        cache = name.replace(".plan", ".timings")
        made = build(bundle.files[NETWORK], bundle.manifest.specs, target, known.get(cache, b""))
        plans[name] = made.plan
        if made.timing_cache:
            caches[cache] = made.timing_cache
        built(name, len(made.plan))
    files = plans | caches
    entries = {name: FileEntry(sha256=sha256(content), size_bytes=len(content)) for name, content in files.items()}
    fields = {name: getattr(bundle.manifest, name) for name in type(bundle.manifest).model_fields}
    manifest = Manifest(**{**fields, "files": {**bundle.manifest.files, **entries}})
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    draft = folder / f"{MANIFEST}.new"
    draft.write_text(manifest.model_dump_json(indent=2) + "\n")
    draft.replace(folder / MANIFEST)
    return list(plans)
