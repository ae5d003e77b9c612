"""`xraygpt-lite chat`: questions and answers about one radiograph, typed or piped in."""

from __future__ import annotations

import contextlib
import sys
from io import TextIOWrapper
from typing import TYPE_CHECKING, Any

import click

from xraygpt_lite.cli import console, options
from xraygpt_lite.errors import BundleError, CancelledError, ClosedError, UsageError, XrayError

if TYPE_CHECKING:
    from xraygpt_lite import ChatSession, XrayModel
    from xraygpt_lite.values import Corners, GenerationOptions

_TASK = "/task"
_WAYS = (
    "/task NAME [X0,Y0,X1,Y1] [QUESTION] asks in a form of the bundle's, /reset starts the conversation again, "
    "/quit or Ctrl-D leaves, Ctrl-C stops an answer"
)


@click.command("chat")
@click.argument("image", metavar="IMAGE")
@click.option("--quiet", is_flag=True, help="No warnings; errors stay.")
@options.model_options
@options.generation_options
def command(
    image: str, quiet: bool, bundle: str | None, device: str, threads: int | None, variant: str | None, **given: Any
) -> int:
    """Ask questions about one radiograph in the terminal.

    Every question sees the answers before it. /task NAME [X0,Y0,X1,Y1] [QUESTION] asks in one of the bundle's forms of
    question, about a rectangle in pixels of the image if it is one about a rectangle. /reset starts the conversation
    again, /quit or Ctrl-D leaves. Ctrl-C stops the answer that is being given; at the prompt it leaves with exit code
    130. The arrow keys recall this conversation's questions, which are kept nowhere. Where standard input is not a
    terminal, each line is a question.
    """
    if image == "-":
        raise UsageError("chat reads its questions from standard input; name the image's file")
    if sys.stdin is None:
        raise UsageError("there is no standard input to read questions from")
    import xraygpt_lite

    wanted = options.generation(**given)
    with xraygpt_lite.load(bundle, device=device, threads=threads) as model:
        model.check(None, wanted, variant=variant)
        with contextlib.closing(_Conversation(model, image, wanted, variant, quiet)) as conversation:
            console.out(f"{model.bundle.manifest.disclaimer}\n")
            return _typed(conversation) if sys.stdin.isatty() else _piped(conversation)


class _Conversation:
    """A chat session that can be started again, and how its answers are shown."""

    def __init__(
        self, model: XrayModel, image: str, wanted: GenerationOptions, variant: str | None, quiet: bool
    ) -> None:
        self._model, self._options = model, wanted
        self._warned: set[str] = set()
        self._quiet = quiet
        self._session: ChatSession = model.chat(image, variant=variant)

    def ask(self, line: str) -> None:
        """Show the answer to a question, or to a /task: on a terminal as it comes, elsewhere as the record has it.

        An interrupt leaves the conversation as if this had not been asked.
        """
        from xraygpt_lite.options import undrawn
        from xraygpt_lite.report import text as form

        question, task, box = self._parse(line)
        screen = console.Live()
        try:
            with self._session.stream(question, self._options, task=task, box=box) as stream:
                for text in stream:
                    if sys.stdout.isatty():
                        screen.piece(text)
                summary = stream.summary
        except BaseException:
            screen.end("")
            raise
        screen.end(form.answer(summary))
        for warning in summary.warnings:
            if not self._quiet and warning not in self._warned:
                console.warn(warning)
        manifest = self._model.bundle.manifest
        # These come with every answer, others are about one answer.
        self._warned |= {*self._session.radiograph.warnings, *manifest.warnings, *undrawn(summary.options, manifest)}

    def _parse(self, line: str) -> tuple[str | None, str | None, Corners | None]:
        """Question, task and box of a line; the first word after a task about a rectangle is the rectangle."""
        if line.split()[0] != _TASK:
            return line, None, None
        tasks = self._model.bundle.manifest.prompt.tasks
        _, *rest = line.split(maxsplit=2)
        if not rest:
            raise UsageError(f"{_TASK} needs a name; this bundle has: {', '.join(sorted(tasks)) or 'none'}")
        name, words = rest[0], rest[1] if len(rest) > 1 else ""
        box = None
        if name in tasks and "{box}" in tasks[name].template and words:
            first, _, words = words.partition(" ")
            box = options.box(first)
        return words.strip() or None, name, box

    def reset(self) -> None:
        self._session.restart()

    def close(self) -> None:
        self._session.close()


def _typed(conversation: _Conversation) -> int:
    """Until the user leaves; a question that fails is said and the next one may be asked."""
    with contextlib.suppress(ImportError):  # line editing and history; absent on Windows
        import readline  # noqa: F401
    click.echo(f"Ask about the radiograph; {_WAYS}.", err=True)
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            console.out("\n")
            return 0
        if question == "/quit":
            return 0
        try:
            if question == "/reset":
                conversation.reset()
            elif question.startswith("/") and question.split()[0] != _TASK:
                console.error(f"{question.split()[0]} is no command; {_WAYS}")
            elif question:
                conversation.ask(question)
        except KeyboardInterrupt:
            click.echo("(stopped; the conversation goes on without this question)", err=True)
        except (BundleError, CancelledError, ClosedError):
            raise
        except XrayError as error:
            console.error(str(error))


def _piped(conversation: _Conversation) -> int:
    """Every line of standard input, to the end; a question that fails does not stop the next."""
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    codes = []
    for line in filter(None, map(str.strip, sys.stdin)):
        if line == "/quit":
            break
        if line == "/reset":
            conversation.reset()
            continue
        console.out(f"> {line}\n")
        try:
            conversation.ask(line)
            codes.append(0)
        except (BundleError, CancelledError, ClosedError):
            raise
        except XrayError as error:
            console.error(str(error))
            codes.append(error.exit_code)
    return 3 if any(codes) and len(codes) > 1 else max(codes, default=0)
