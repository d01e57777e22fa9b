"""Build TensorRT plans into a bundle. A plan fits one version of TensorRT and one GPU architecture."""

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
    """Build plans into a bundle's folder. The manifest is replaced last, so a crash leaves the old bundle intact.

    Args:
        folder: folder of a bundle that is not published yet.
        settings: build settings; `architectures` is ignored.
        version: version of the library.
        architectures: compute capabilities such as `8.9`, one plan each.
        built: called with the name and the size in bytes of every plan.
        timings: files of another bundle whose timing caches speed up the build; only TensorRT has them.

    Returns:
        The names of the plans.

    Raises:
        BundleError: the bundle cannot be read.
        EngineError: the library cannot build the network.
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
