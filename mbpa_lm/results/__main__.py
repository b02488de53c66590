"""The command line: read the runs, write the page."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mbpa_lm.errors import DataError, MbpaError, reason
from mbpa_lm.results.page import results_page
from mbpa_lm.results.runs import load_runs


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m mbpa_lm.results", description="Write RESULTS.md from run folders.")
    parser.add_argument("folder", type=Path, help="Folder of run folders that evaluate.py wrote.")
    parser.add_argument("--output", type=Path, default=Path("RESULTS.md"), help="File to write.")
    options = parser.parse_args(arguments)
    try:
        page = results_page(load_runs(options.folder), options.folder)
        try:
            options.output.write_text(page, encoding="utf-8")
        except OSError as error:
            raise DataError(f"{options.output} could not be written: {reason(error)}") from None
    except MbpaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
