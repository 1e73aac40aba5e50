"""`optimum-cli quantize awq`: optimum finds this file in its namespace of commands; no folder may have an __init__.py.

optimum imports this file whenever its command line starts, so it imports nothing heavy.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from hf_awq_offload.cli.parser import add_common_options, add_quantize_options
from hf_awq_offload.cli.signals import Signals


class AwqCommand(BaseOptimumCLICommand):
    """`optimum-cli quantize awq SRC OUT`, which takes the options of `hf-awq-offload quantize`."""

    COMMAND = CommandInfo(name="awq", help="AWQ quantization with hf_awq_offload, one decoder layer at a time")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        add_quantize_options(parser)
        add_common_options(parser)

    def run(self) -> None:
        assert self.args is not None
        self.args.command = "quantize"
        self.args.command_line = ["optimum-cli", *sys.argv[1:]]
        from hf_awq_offload.cli.command import run

        sys.exit(run(self.args, Signals(ends_process=True)))


class QuantizeCommand(BaseOptimumCLICommand):
    """`optimum-cli quantize`, whose only subcommand is ours."""

    COMMAND = CommandInfo(name="quantize", help="quantize a checkpoint")
    SUBCOMMANDS = (CommandInfo(name="awq", help=AwqCommand.COMMAND.help, subcommand_class=AwqCommand),)


REGISTER_COMMANDS = iter([QuantizeCommand])
"""An iterator, so that only the first read yields the command: optimum reads this once per folder that has the file (a
clone on the path beside an installation), and argparse refuses a command that is registered twice."""
