"""The console script. It stands before the command line, which needs what the extra `export` brings."""

from __future__ import annotations

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Runs the command line, or says in one line what has to be installed for it."""
    try:
        from memopt_export import cli
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("memopt"):
            raise
        hint = "pip install 'memopt[export]'"
        sys.stderr.write(f"memopt-export: error: {error.name} is not installed; hint: {hint}\n")
        sys.exit(5)
    cli.main()


if __name__ == "__main__":
    main()
