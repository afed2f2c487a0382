"""Compile every library now, in place of when it is first used: ``python -m deltamoe.ops.native``.

Prints a line for each; a machine without a compiler is told so and nothing fails.
"""

from pathlib import Path

from deltamoe.ops.native.build import BuildError, open_library

for source in sorted(Path(__file__).parent.glob("*.cpp")):
    try:
        open_library(source.stem)
        print(f"{source.name}: ready")
    except BuildError as error:
        print(f"{source.name}: PyTorch's form will run: {error}")
