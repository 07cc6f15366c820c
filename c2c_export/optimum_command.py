"""`optimum-cli export c2c …`: another door to `c2c-export pair …`.

In: the options of `pair`, which are read off that command, so that both have the same ones. Out: what `pair` does, its
errors and exit status included. Optimum finds the command through the distribution in `scripts/optimum_command`, which
installs one file into optimum's namespace and brings optimum.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand
from typer.main import get_command

from c2c_export import cli


class C2CExportCommand(BaseOptimumCLICommand):
    """The command, as optimum registers it."""

    COMMAND = CommandInfo(name="c2c", help="Export a Cache-to-Cache pair to a bundle of portable ONNX graphs.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Give `parser` the options of `pair`. Values stay text, which `pair` checks."""
        parser.description = _pair().help
        for option in _options():
            settings: dict[str, Any] = {"dest": option.name, "help": (option.help or "").replace("%", "%%")}
            if option.is_flag:
                settings |= {"action": "store_true"}
            else:
                settings |= {"required": option.required, "metavar": option.name.upper()}
                settings |= {"action": "append"} if option.multiple else {}
            parser.add_argument(*option.opts, **settings)

    def run(self) -> None:
        """Run `c2c-export pair` in this process. Ends it, with the same exit status, where that fails."""
        cli.main(["pair", *_arguments(self.args)])


REGISTER_COMMANDS = [(C2CExportCommand, ExportCommand)]


def _pair() -> Any:
    return get_command(cli.app).commands["pair"]  # type: ignore[attr-defined]


def _options() -> list[Any]:
    return [option for option in _pair().params if option.name != "help"]


def _arguments(given: Namespace) -> Iterator[str]:
    """The options as `pair` takes them on its command line."""
    for option in _options():
        value = getattr(given, option.name)
        if option.is_flag:
            yield from [option.opts[0]] if value else []
        elif value is not None:
            for entry in value if option.multiple else [value]:
                yield f"{option.opts[0]}={entry}"
