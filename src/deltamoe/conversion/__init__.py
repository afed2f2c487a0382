"""From one program's model files to another's, streamed: memory never holds more than a tensor.

What lives here: the source of a conversion, the plan of one, and a module for each target: a
published (Hugging Face) folder, a checkpoint of ours, a quantised one, a GGUF file.
May import: errors, config, plan, model, checkpoint, tokenizer; torch when tensors move.
Read first: convert.py, then source.py and hf.py.
"""

from deltamoe.conversion.convert import convert, plan_conversion
from deltamoe.conversion.hf import plan_hf, write_hf
from deltamoe.conversion.native import plan_native, write_native
from deltamoe.conversion.plan import ConversionPlan, PlannedFile
from deltamoe.conversion.quantized import plan_quantized, write_quantized
from deltamoe.conversion.source import Source, open_source

__all__ = [
    "ConversionPlan",
    "PlannedFile",
    "Source",
    "convert",
    "open_source",
    "plan_conversion",
    "plan_hf",
    "plan_native",
    "plan_quantized",
    "write_hf",
    "write_native",
    "write_quantized",
]
