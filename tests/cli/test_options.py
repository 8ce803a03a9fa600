"""Values of options as they are typed, and the signatures that take them."""

from __future__ import annotations

import inspect
import pkgutil
from importlib import import_module

import pytest
import typer

import sdrt.cli
from sdrt.cli import options
from sdrt.errors import UsageError


def test_sizes() -> None:
    assert options.parse_size(None) is None and options.parse_sizes(None) is None
    assert options.parse_size("512X768") == (512, 768)
    assert options.parse_sizes("512x768") == ((512, 768), (512, 768))
    assert options.parse_sizes("512x512:768x1024") == ((512, 512), (768, 1024))
    for text in ("", "512", "512x", "x512", "-8x8", "1234567x8", "8x8 ", "8x8x8"):
        for parse in (options.parse_size, options.parse_sizes):
            with pytest.raises(UsageError, match=f"--size {text}: expected WIDTHxHEIGHT"):
                parse(text)
    with pytest.raises(UsageError, match="--original-size 8: expected WIDTHxHEIGHT"):
        options.parse_size("8", option="--original-size")
    assert options.parse_corner(None) is None and options.parse_corner("16,8") == (16, 8)
    for text in ("", "1", "1,", "1,2,3", "-1,0", "1x2"):
        with pytest.raises(UsageError, match=f"--crop-top-left {text}: expected TOP,LEFT"):
            options.parse_corner(text)
    for text in ("8x8:", ":8x8", "8x8:8x8:8x8", "8x8:8"):
        with pytest.raises(UsageError, match="or a smallest and a largest"):
            options.parse_sizes(text)


def test_numbers() -> None:
    assert (options.parse_range("--batch", "4"), options.parse_range("--batch", "1:4")) == ((4, 4), (1, 4))
    assert options.parse_numbers("--sm", "86,120") == (86, 120)
    for text in ("", "1:", ":4", "a", "-1", "1:2:3"):
        with pytest.raises(UsageError, match=f"--batch {text}: expected a number"):
            options.parse_range("--batch", text)
    for text in ("", "86,", ",86", "86 120"):
        with pytest.raises(UsageError, match=f"--sm {text}: expected numbers"):
            options.parse_numbers("--sm", text)


def test_lists() -> None:
    assert options.parse_timesteps(None) is None and options.parse_sigmas(None) is None
    assert options.parse_timesteps("999,0") == (999, 0) and options.parse_sigmas("14.6,1e-1,0") == (14.6, 0.1, 0.0)
    for text in ("", "999,", "9 9", "1.5"):
        with pytest.raises(UsageError, match=f"--timesteps {text}: expected whole numbers"):
            options.parse_timesteps(text)
    for text in ("", "14,", "a"):
        with pytest.raises(UsageError, match=f"--sigmas {text}: expected numbers"):
            options.parse_sigmas(text)


def test_only_commands_take_many_parameters() -> None:
    """Typer makes a parameter of every option of a command. No other function here has more than six that a caller may give by place."""
    groups = [typer.main.get_group(sdrt.cli.app)]
    commands = set()
    for group in groups:
        groups += [command for command in group.commands.values() if hasattr(command, "commands")]  # type: ignore[misc]
        commands |= {
            inspect.unwrap(command.callback) for command in group.commands.values() if command.callback is not None
        }
    seen = 0
    for module in pkgutil.iter_modules(sdrt.cli.__path__, "sdrt.cli."):
        for name, function in inspect.getmembers(import_module(module.name), inspect.isfunction):
            if function.__module__ == module.name and function not in commands:
                given = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.KEYWORD_ONLY]
                assert len(given) <= 6, f"{module.name}.{name}"
                seen += 1
    assert seen > 20 and len(commands) > 10
