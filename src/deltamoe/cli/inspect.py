"""``deltamoe inspect``: what a file, a checkpoint or a run holds, without running any of it.

Only headers, manifests and configurations are read, strictly; text from the file is shown escaped.
``--deep`` reads every byte: SHA-256 against the manifest, and a search for NaN and infinity.
"""

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from deltamoe.checkpoint.folder import WEIGHTS, Checkpoint, open_checkpoint, step_folders
from deltamoe.checkpoint.header import MAX_TENSORS, Header, read_header
from deltamoe.checkpoint.manifest import MANIFEST
from deltamoe.checkpoint.published import is_published, open_published, read_published_config
from deltamoe.checkpoint.quantized import check_stored
from deltamoe.checkpoint.run_folder import load_config
from deltamoe.cli.format import table
from deltamoe.config.model import ModelConfig
from deltamoe.config.parse import to_dict
from deltamoe.errors import BadFileError, CheckpointError
from deltamoe.plan import parameters

__all__ = ["command"]

_LONGEST_TEXT = 200


@click.command("inspect")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--deep", is_flag=True, help="Read all data: check hashes, look for NaN.")
def command(path: Path, as_json: bool, deep: bool) -> None:
    """Show what PATH holds: a safetensors file, a step folder, a run folder or a published one.

    Nothing in it is executed. Exits with 3 if something is wrong with it, after showing what can
    be shown.
    """
    report, faults = _inspect(path, deep)
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        click.echo("\n".join(_lines(report)))
    if faults:
        raise faults[0]


def _inspect(path: Path, deep: bool) -> tuple[dict[str, Any], list[BadFileError]]:
    """The report and what was found wrong, the gravest first."""
    if not path.is_dir():
        return _inspect_file(path, deep), []
    if (path / "checkpoints").is_dir() and not (path / MANIFEST).exists():
        return _inspect_run(path, deep)
    if is_published(path):
        return _inspect_published(path, deep)
    return _inspect_step(path, deep)


def _inspect_file(path: Path, deep: bool) -> dict[str, Any]:
    header = read_header(path)
    if deep:
        _require_finite(path)
    return {"path": str(path), "kind": "file", "finite": deep or None, **_tensors(header)}


def _inspect_run(run: Path, deep: bool) -> tuple[dict[str, Any], list[BadFileError]]:
    """Every checkpoint's verdict, and the newest good one in full."""
    report: dict[str, Any] = {"path": str(run), "kind": "run", "checkpoints": []}
    faults: list[BadFileError] = []
    newest = None
    for folder in step_folders(run):
        try:
            newest = open_checkpoint(folder, check_hashes=deep).path
            verdict = _verdict(deep)
        except CheckpointError as fault:
            faults.append(fault)
            verdict = str(fault)
        report["checkpoints"].append({"path": str(folder), "verdict": verdict})
    if newest is None:
        faults.append(CheckpointError(f"{run}: holds no good checkpoint"))
        return report, faults
    report["newest"], more = _inspect_step(newest, deep)
    return report, faults + more


def _inspect_step(folder: Path, deep: bool) -> tuple[dict[str, Any], list[BadFileError]]:
    report: dict[str, Any] = {"path": str(folder), "kind": "checkpoint"}
    faults: list[BadFileError] = []
    try:
        checkpoint = open_checkpoint(folder, check_hashes=deep)
        report |= {"step": checkpoint.step, "verdict": _verdict(deep), "files": _files(checkpoint)}
    except CheckpointError as fault:
        report["verdict"] = str(fault)
        faults.append(fault)
    model = None
    try:
        model = load_config(folder)
        report |= {"model": _summary(model), "config": to_dict(model)}
    except CheckpointError as fault:
        report["model"] = str(fault)
        faults.append(fault)
    try:
        header = read_header(folder / WEIGHTS)
        report |= _tensors(header)
        if model is not None and (bits := check_stored(header, model)):
            report |= {"bits": bits, "parameters": parameters(model).total}
        if deep:
            _require_finite(folder / WEIGHTS)
            report["finite"] = True
    except CheckpointError as fault:
        report["weights"] = str(fault)
        faults.append(fault)
    return report, faults


def _inspect_published(folder: Path, deep: bool) -> tuple[dict[str, Any], list[BadFileError]]:
    """All files of weights as one header; under the official names if the folder is good."""
    report: dict[str, Any] = {"path": str(folder), "kind": "published"}
    try:
        model = read_published_config(folder)
        report |= {"model": _summary(model), "config": to_dict(model)}
        published = open_published(folder)
        headers = {header.path: header for header, _ in published.places.values()}
        report |= {"headers": _headers(headers.values()), **_tensors(published.header)}
        if deep:
            for path in headers:
                _require_finite(path)
            report["finite"] = True
    except CheckpointError as fault:
        stored = _readable_headers(folder)
        tensors = {name: info for header in stored for name, info in header.tensors.items()}
        num_bytes = sum(header.file_bytes for header in stored)
        report |= {"weights" if "model" in report else "model": str(fault)}
        report |= {"headers": _headers(stored), **_tensors(Header(folder, tensors, {}, num_bytes))}
        return report, [fault]
    return report, []


def _readable_headers(folder: Path) -> list[Header]:
    """The headers of a faulty folder that can be read, up to as many tensors as one may hold."""
    headers: list[Header] = []
    for path in sorted(folder.glob("*.safetensors")):
        with suppress(CheckpointError):
            headers.append(read_header(path))
        if sum(len(header.tensors) for header in headers) > MAX_TENSORS:
            break
    return headers


def _headers(headers: Iterable[Header]) -> list[dict[str, Any]]:
    return [
        {"name": header.path.name, "bytes": header.file_bytes, "tensors": len(header.tensors)}
        for header in headers
    ]


def _require_finite(path: Path) -> None:
    from deltamoe.checkpoint.tensors import read_tensors

    read_tensors(path, check_finite=True)


def _verdict(deep: bool) -> str:
    return "whole: sizes and SHA-256 agree" if deep else "whole: sizes agree (--deep compares more)"


def _files(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    return [
        {"name": name, "bytes": record.num_bytes, "sha256": record.sha256}
        for name, record in checkpoint.manifest.files.items()
    ]


def _summary(model: ModelConfig) -> str:
    experts = f", {model.moe.num_experts} experts" if model.moe else ""
    return (
        f"{model.num_layers} layers ({model.schedule}), width {model.dim:,}, "
        f"vocabulary {model.vocab_size:,}{experts}"
    )


def _tensors(header: Header) -> dict[str, Any]:
    elements: dict[str, int] = {}
    for info in header.tensors.values():
        elements[info.dtype] = elements.get(info.dtype, 0) + info.num_elements
    return {
        "bytes": header.file_bytes,
        "metadata": dict(header.metadata),
        "parameters": header.num_elements,
        "parameters_by_dtype": elements,
        "tensors": [
            {"name": name, "dtype": info.dtype, "shape": info.shape, "bytes": info.num_bytes}
            for name, info in header.tensors.items()
        ],
    }


def _lines(report: dict[str, Any]) -> list[str]:
    lines = [f"{report['path']}  ({report['kind']})"]
    for checkpoint in report.get("checkpoints", []):
        lines.append(f"  {Path(checkpoint['path']).name:12} {checkpoint['verdict']}")
    if "newest" in report:
        return [*lines, "", *_lines(report["newest"])]
    for key in ("step", "verdict", "model", "weights", "finite"):
        if report.get(key) is not None:
            lines.append(f"  {key:12} {report[key]}")
    for file in report.get("headers", []):
        size = f"{file['bytes']:,} bytes, {file['tensors']:,} tensors"
        lines.append(f"  {'file':12} {file['name']}  {size}")
    for file in report.get("files", []):
        lines.append(f"  {'file':12} {file['name']}  {file['bytes']:,} bytes")
    if "tensors" in report:
        by_dtype = ", ".join(f"{n:,} {d}" for d, n in report["parameters_by_dtype"].items())
        lines.append(f"  {'tensors':12} {len(report['tensors']):,}, {report['bytes']:,} bytes")
        lines.append(f"  {'parameters':12} {report['parameters']:,} ({by_dtype or 'none'})")
        if "bits" in report:
            lines.append(f"  {'quantised':12} to {report['bits']} bits")
        lines += [f"  {'metadata':12} {_escaped(k, v)}" for k, v in report["metadata"].items()]
        lines += ["", _table(report["tensors"])]
    return lines


def _escaped(key: str, value: str) -> str:
    text = f"{key} = {value}"
    text = text if len(text) <= _LONGEST_TEXT else text[: _LONGEST_TEXT - 1] + "…"
    return text if text.isprintable() else ascii(text)


def _table(tensors: list[dict[str, Any]]) -> str:
    rows = [("tensor", "dtype", "shape", "bytes")]
    for tensor in tensors:
        shape = str(list(tensor["shape"]))
        rows.append((tensor["name"], tensor["dtype"], shape, f"{tensor['bytes']:,}"))
    return table(rows, right=(3,))
