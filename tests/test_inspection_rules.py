"""The registry of rules: every code of the package is in it, and every rule is emitted somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import buffer_lifting
from buffer_lifting.cli import main
from buffer_lifting.inspection.rules import RULES, SEVERITIES, UnknownRuleError, check_prefixes, is_enabled, rule

PACKAGE = Path(buffer_lifting.__file__).parent
NO_PYTHON = {"BL302"}  # its examples are shapes


def test_every_code_in_the_package_is_registered_and_every_rule_is_emitted() -> None:
    emitted = set()
    for file in PACKAGE.rglob("*.py"):
        if file.name != "rules.py":
            # quoted codes only: comments and help texts may name ranges
            emitted |= set(re.findall(r'"(BL\d{3})\b', file.read_text()))
    assert emitted == set(RULES)


def test_rules_are_complete() -> None:
    assert list(RULES) == sorted(RULES)
    assert len({entry.name for entry in RULES.values()}) == len(RULES)
    for code, entry in RULES.items():
        assert entry.code == code and re.fullmatch(r"BL[01239]\d\d", code)
        assert entry.severity in SEVERITIES
        assert re.fullmatch(r"[a-z]+(-[a-z]+)*", entry.name)
        assert entry.message and "\n" not in entry.message and not entry.message.endswith(".")
        assert entry.help and max(map(len, entry.help.splitlines())) <= 120
        for example in (entry.bad, entry.good):
            assert example
            if code not in NO_PYTHON:
                compile(textwrap.dedent(example), code, "exec")


def test_rule_prints_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rule", "bl001"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("BL001 buffer-read-by-position (warning)\na buffer or constant is read by sequence position")
    assert "Bad:\n\n    def forward(self, x):\n        return rotate" in out
    assert "Good:\n\n    lifted = bl.lift(program)" in out


def test_rule_all_prints_every_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rule", "--all"]) == 0
    out = capsys.readouterr().out
    assert re.findall(r"^(BL\d{3}) ", out, re.MULTILINE) == list(RULES)


@pytest.mark.parametrize("args", [["BL999"], [], ["--all", "BL001"], ["BL0"]])
def test_rule_refuses(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rule", *args]) == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert captured.err.startswith("buffer-lifting: error: ") and captured.err.count("\n") == 1


def test_unknown_codes_are_errors() -> None:
    with pytest.raises(UnknownRuleError, match="BL999"):
        rule("BL999")
    with pytest.raises(UnknownRuleError, match=r"--select: no rule begins with 'BL9999'"):
        check_prefixes(["BL0", "BL9999"], "--select")
    with pytest.raises(UnknownRuleError):
        check_prefixes([""], "--select")
    assert check_prefixes([" bl0 ", "BL101"], "--select") == ("BL0", "BL101")


@pytest.mark.parametrize(
    ("code", "select", "ignore", "enabled"),
    [
        ("BL001", (), (), True),
        ("BL001", ("BL1",), (), False),
        ("BL101", ("BL1",), ("BL101",), False),
        ("BL102", ("BL1",), ("BL101",), True),
        ("BL101", ("BL101",), ("BL1",), True),
        ("BL101", ("BL1",), ("BL1",), False),
        ("BL101", (), ("BL",), False),
        ("BL101", ("BL101",), ("BL",), True),
    ],
)
def test_the_longer_prefix_decides(code: str, select: tuple[str, ...], ignore: tuple[str, ...], enabled: bool) -> None:
    assert is_enabled(code, select, ignore) is enabled


def test_rule_does_not_import_torch() -> None:
    code = (
        "import sys; from buffer_lifting.cli import main; "
        "assert main(['rule', '--all']) == 0; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
