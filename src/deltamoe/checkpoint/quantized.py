"""The file of a quantised model: which tensors it holds, and how a reader knows.

A step folder whose ``model.safetensors`` says so in its metadata:

    kind = "deltamoe.quantized"   format = "1"   bits = "8" or "4"

In the place of a quantised weight ``blocks.0.mixer.q_proj.weight`` stand its codes and scales,
``blocks.0.mixer.q_proj.values`` and ``.scales``, in the layout of ``deltamoe.ops.quantized``; an
expert stack's are ``….experts.w_up.values`` and ``.scales``. All other tensors are as in any
checkpoint. Which weights are quantised ``deltamoe.plan.quantized_bits`` decides, so the file does
not say it.

No torch. ``weights.py`` reads the tensors.
"""

from collections.abc import Iterator, Mapping

from deltamoe.checkpoint.header import Header, TensorSpec, check_shapes
from deltamoe.config.model import ModelConfig
from deltamoe.config.strict_json import check_format
from deltamoe.errors import CheckpointError
from deltamoe.plan import BITS, Bits, Weight, quantized_bits, quantized_shapes, weights

__all__ = [
    "check_stored",
    "parts_of",
    "quantization_of",
    "quantized_metadata",
    "stored_tensors",
]

_KIND = "deltamoe.quantized"
_FORMAT = 1


def quantized_metadata(bits: Bits) -> dict[str, str]:
    """What the header of a quantised model's file says."""
    return {"kind": _KIND, "format": str(_FORMAT), "bits": str(bits)}


def quantization_of(header: Header) -> Bits | None:
    """The bits of a quantised model's file; None for any other file.

    Raises:
        CheckpointError: a newer format, or bits that are neither 8 nor 4.
    """
    metadata: Mapping[str, str] = header.metadata
    if metadata.get("kind") != _KIND:
        return None
    version = metadata.get("format", "")
    check_format(
        {"format": int(version) if version.isdecimal() and len(version) < 10 else version},
        source=str(header.path),
        known=_FORMAT,
        error=CheckpointError,
    )
    for bits in BITS:
        if metadata.get("bits") == str(bits):
            return bits
    raise CheckpointError(
        f"{header.path}: bits {ascii(metadata.get('bits'))[:40]}; expected "
        f"{' or '.join(map(str, BITS))}"
    )


def check_stored(header: Header, config: ModelConfig) -> Bits | None:
    """Compare a file's names and shapes with a configuration, quantised or not.

    Returns:
        as ``quantization_of``.

    Raises:
        CheckpointError: as ``quantization_of`` and ``check_shapes``, or codes or scales of another
            dtype than theirs.
    """
    bits = quantization_of(header)
    rounded = []

    def expected() -> Iterator[tuple[str, tuple[int, ...]]]:
        for weight, spec in stored_tensors(config, bits, dtype="F32"):
            if spec.name != weight.name:
                rounded.append(spec)
            yield spec.name, spec.shape

    check_shapes(header, expected())
    for spec in rounded:
        if (found := header.tensors[spec.name].dtype) != spec.dtype:
            raise CheckpointError(
                f"{header.path}: tensor {spec.name!r} is {found}; expected {spec.dtype}"
            )
    return bits


def stored_tensors(
    config: ModelConfig, bits: Bits | None, *, dtype: str
) -> Iterator[tuple[Weight, TensorSpec]]:
    """Each tensor that a model's file holds, with the weight it belongs to, in no promised order.

    Args:
        config: the geometry.
        bits: None if nothing is quantised.
        dtype: safetensors' word for what all but the wide and the quantised ones are stored in.
    """
    for weight in weights(config):
        own = None if bits is None else quantized_bits(weight, bits)
        if own is None:
            stored = "F32" if weight.is_fp32 else dtype
            yield weight, TensorSpec(weight.name, stored, weight.shape)
        else:
            values, scales = parts_of(weight.name)
            of_values, of_scales = quantized_shapes(weight.shape, own)
            yield weight, TensorSpec(values, "U8", of_values)
            yield weight, TensorSpec(scales, "F16", of_scales)


def parts_of(name: str) -> tuple[str, str]:
    """The names under which a quantised weight's codes and scales are stored."""
    layer = name.removesuffix(".weight")
    return f"{layer}.values", f"{layer}.scales"
