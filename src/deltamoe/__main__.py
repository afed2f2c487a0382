"""``python -m deltamoe`` is the command ``deltamoe``."""

import sys

from deltamoe.cli import main

if __name__ == "__main__":
    sys.exit(main())
