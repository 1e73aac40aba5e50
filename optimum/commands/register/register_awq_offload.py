"""`optimum-cli quantize awq`: found by optimum in its namespace of commands, where no folder may have an __init__.py.

optimum imports this file at every start of its command line; it imports nothing heavy itself.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from hf_awq_offload.cli.main import run
from hf_awq_offload.cli.parser import add_common_options, add_quantize_options


class AwqCommand(BaseOptimumCLICommand):
    """`optimum-cli quantize awq SRC OUT`, with the options of `hf-awq-offload quantize`."""

    COMMAND = CommandInfo(name="awq", help="AWQ, one decoder layer at a time, by hf_awq_offload")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        add_quantize_options(parser)
        add_common_options(parser)

    def run(self) -> None:
        assert self.args is not None
        self.args.command = "quantize"
        self.args.command_line = ["optimum-cli", *sys.argv[1:]]
        sys.exit(run(self.args))


class QuantizeCommand(BaseOptimumCLICommand):
    """`optimum-cli quantize`: its only subcommand is ours."""

    COMMAND = CommandInfo(name="quantize", help="quantize a checkpoint")
    SUBCOMMANDS = (CommandInfo(name="awq", help=AwqCommand.COMMAND.help, subcommand_class=AwqCommand),)


REGISTER_COMMANDS = iter([QuantizeCommand])
"""optimum reads this once per folder that has this file: a clone on the path beside an installation must not register a
command twice, which argparse refuses. So it is used up after the first time."""
