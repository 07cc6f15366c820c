"""`python -m c2c_export.lm_eval …`: the harness's own command line, every option of it, with the model `c2c`.

Exit status as that of `c2c-export`: 2 for wrong arguments of ours, 1 for a bundle that cannot be opened or run.
"""

import sys

from lm_eval.__main__ import cli_evaluate

from c2c_export.errors import C2CError


def main() -> None:
    """Run the harness; an error of ours is printed in one or two lines, without a traceback."""
    try:
        cli_evaluate()
    except C2CError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
