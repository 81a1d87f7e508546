"""How every command of ours shows itself: plain help that fits a screen, and completion of names."""

from typing import Any

from typer.core import TyperGroup


class InterruptedByUserError(Exception):
    """Ctrl-C or SIGTERM came: typer would end without a word."""


class Group(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise InterruptedByUserError from None


# Typer's frames and colours take half of the width, and a log or a pipe has no use for them.
PLAIN: dict[str, Any] = {
    "cls": Group,
    "rich_markup_mode": None,
    "no_args_is_help": True,
    "pretty_exceptions_enable": False,
    "context_settings": {"max_content_width": 100, "help_option_names": ["--help", "-h"]},
}
# Of a group below another: only the outermost one offers completion.
GROUP = PLAIN | {"add_completion": False}
BENCHES = ("ingest", "plan", "files", "list", "decoders", "augment", "read", "feed", "step")


def presets_like(incomplete: str) -> list[str]:
    """Names of presets that begin so."""
    from trainer.preset_files import preset_names

    return [name for name in preset_names() if name.startswith(incomplete)]


def benches_like(incomplete: str) -> list[str]:
    """Names of `medswav bench` that begin so."""
    return [name for name in BENCHES if name.startswith(incomplete)]
