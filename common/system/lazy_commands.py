"""Commands whose module is imported when they are called, so that `--help` is quick."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import click
from typer.core import TyperGroup
from typer.main import get_group


class LazyCommand(click.Command):
    """A command, or a group of commands, of a module that is not imported yet."""

    def __init__(self, name: str, place: str, help: str) -> None:
        super().__init__(name, help=help)
        self.place = place
        """`module:attribute` of the Typer that is, or holds, the command."""

    def load(self) -> click.Command:
        """Import the module and return the command."""
        module, _, attribute = self.place.partition(":")
        group = get_group(getattr(import_module(module), attribute))
        return group.commands.get(self.name or "", group)

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        """Return the context of the command itself."""
        return self.load().make_context(info_name, args, parent, **extra)


def lazy_group(places: Mapping[str, tuple[str, str]]) -> type[TyperGroup]:
    """Return a class of group for `typer.Typer(cls=...)`.

    Parameters
    ----------
    places
        Name of each command: the place, see `LazyCommand`, and the line of help.
    """

    class Group(TyperGroup):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            for name, (place, line) in places.items():
                self.add_command(LazyCommand(name, place, line))

    return Group
