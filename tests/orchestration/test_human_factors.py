"""Every command helps on one screen with an example, completes, stops with 130, and says what is wrong and
where to look; listings have JSON, colours and bars are for terminals only."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from orchestration import cli, cli_ingest
from orchestration.cli import ingest_main, main
from orchestration.job_list import local_time
from orchestration.progress import Progress

SCREEN_LINES, COLUMNS = 40, 80
LISTINGS = {"ls", "status", "presets", "show", "verify", "report", "doctor", "plan"}


def walk(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, command
    for name, below in getattr(command, "commands", {}).items():
        yield from walk(below, (*path, name))


COMMANDS = dict(walk(typer.main.get_command(cli.app)))
LEAVES = [path for path, command in COMMANDS.items() if not getattr(command, "commands", None)]


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_fits_a_screen_has_an_example_that_is_right_and_no_colour(path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main([*path, "--help"]) == 0
    text = capsys.readouterr().out
    assert "Example: " in text and "\x1b" not in text
    assert len(text.splitlines()) <= SCREEN_LINES and max(map(len, text.splitlines())) <= COLUMNS
    named = "".join(text.split("Example: ")[1].split()[:3])
    assert named.startswith(("medswav", "ingest")) and "".join(path[:1]) in named


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_a_listing_has_json_and_every_option_says_what_it_is_for(path):
    command = COMMANDS[path]
    options = {name for parameter in command.params for name in parameter.opts}
    if path[-1] in LISTINGS:
        assert "--json" in options
    silent = [p.name for p in command.params if not getattr(p, "help", None) and p.opts[0].startswith("--")]
    assert silent == []


@pytest.mark.parametrize("path", [path for path in LEAVES if path != ("submit",)], ids=" ".join)
def test_an_unknown_option_is_one_line_that_names_the_command_to_ask(path, capsys):
    assert main([*path, "--no-such-option"]) == 2
    err = capsys.readouterr().err.strip()
    assert (
        len(err.splitlines()) == 1 and err.startswith("error: ") and f"medswav {' '.join(path)} --help" in err
    )


def test_a_mistyped_command_is_answered_with_the_one_that_was_meant(capsys):
    assert main(["pretrian"]) == 2 and "pretrain" in capsys.readouterr().err
    assert ingest_main(["verfy"]) == 2 and "verify" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_command_with_130_and_says_how_to_go_on(number):
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job begins without it
        "from orchestration import cli, run_list\n"
        "def wait(*_):\n"
        "    print('here', flush=True)\n"
        "    time.sleep(60)\n"
        "run_list.ls = wait\n"
        "sys.exit(cli.main(['ls']))\n"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        assert process.stdout.readline() == "here\n"
        process.send_signal(number)
        err = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and err == f"{cli.INTERRUPTED}\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "environment", "bar", "colour"),
    [
        (Terminal(), {"TERM": "xterm-256color"}, True, True),
        (Terminal(), {"TERM": "xterm-256color", "NO_COLOR": "1"}, True, False),
        (Terminal(), {"TERM": "dumb"}, False, False),
        (io.StringIO(), {"TERM": "xterm-256color"}, False, False),
    ],
    ids=["terminal", "no colour", "dumb", "pipe"],
)
def test_bars_and_colours_are_for_terminals_that_want_them(stream, environment, bar, colour, monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with Progress("work", 2, "units", stream=stream) as progress:
        progress.update(1)
        progress.update(2)
    text = stream.getvalue()
    assert ("\x1b[" in text) == bar and (
        "\x1b[38;" in text or "\x1b[3" in text.replace("\x1b[38;", "")
    ) == colour
    assert bar or text.startswith("work: 2/2 units")


@pytest.mark.parametrize(
    ("program", "words", "expected"),
    [
        ("medswav", "pret", {"pretrain"}),
        ("medswav", "presets show recommended_2d", {"recommended_2d_mixed", "recommended_2d_xray"}),
        ("medswav", "pretrain --preset de", {"demo"}),
        ("medswav", "bench de", {"decoders"}),
        ("ingest", "qua", {"quarantine"}),
        ("ingest", "run --path", {"--path-map"}),
    ],
)
def test_the_shell_completes_commands_options_and_names(program, words, expected):
    variables = {
        f"_{program.upper()}_COMPLETE": "complete_bash",
        "COMP_WORDS": f"{program} {words}",
        "COMP_CWORD": str(len(words.split())),
    }
    main_of = {"medswav": "main", "ingest": "ingest_main"}[program]
    code = f"import sys; from orchestration.cli import {main_of}; sys.exit({main_of}([]))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | variables, capture_output=True, text=True, timeout=60
    )
    assert set(done.stdout.split()) == expected, done.stderr


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash is installed")
def test_the_script_that_show_completion_prints_is_one_that_bash_takes(monkeypatch, capsys):
    code = "import sys; from orchestration.cli import main; sys.exit(main(['--show-completion', 'bash']))"
    variables = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | variables, capture_output=True, text=True, timeout=60
    )
    assert "complete -o default -F _medswav_completion medswav" in done.stdout
    subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=True)


def test_json_of_a_listing_is_json_and_nothing_else(capsys, tmp_path):
    for command in (
        ["presets", "--json"],
        ["ls", str(tmp_path), "--json"],
        ["presets", "show", "demo", "--json"],
    ):
        assert main(command) == 0
        json.loads(capsys.readouterr().out)


def test_a_time_for_people_is_that_of_their_clock(monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    import time

    time.tzset()
    try:
        assert local_time("2026-11-25T19:40:05Z") == "2026-11-26 04:40" and local_time(None) == ""
    finally:
        monkeypatch.undo()
        time.tzset()


def test_ingest_is_the_same_command_below_medswav():
    own = dict(walk(typer.main.get_command(cli_ingest.app)))
    assert {path[1:] for path in COMMANDS if path[:1] == ("ingest",)} == set(own)
