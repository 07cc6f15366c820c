"""Where `optimum-cli` looks for commands of other packages.

No folder of this path has an `__init__.py`, as it is a namespace that optimum shares.
"""

from c2c_export.optimum_command import REGISTER_COMMANDS

__all__ = ["REGISTER_COMMANDS"]
