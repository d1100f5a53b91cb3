"""The commands ``rule`` and ``check``: their arguments, and what they print where."""

from __future__ import annotations

import argparse
from typing import Any

from buffer_lifting.inspection.rules import RULES, rule, rule_page


class CheckError(Exception):
    """Arguments or configuration that do not fit; the message is one line."""


def _rule(args: argparse.Namespace) -> int:
    if args.all == bool(args.codes):
        raise CheckError("give one or more rule codes, or --all")
    entries = RULES.values() if args.all else [rule(code) for code in args.codes]
    print("\n\n".join(rule_page(entry) for entry in entries))
    return 0


def add_rule_command(commands: Any, common: argparse.ArgumentParser) -> None:
    """Adds ``rule`` to the subparsers."""
    sub = commands.add_parser(
        "rule",
        help="explain a rule code",
        description="Print the page of a rule: severity, message, help, a bad and a good example.",
        parents=[common],
    )
    sub.add_argument("codes", nargs="*", metavar="CODE", help="as in BL001")
    sub.add_argument("--all", action="store_true", help="every rule")
    sub.set_defaults(run=_rule)
