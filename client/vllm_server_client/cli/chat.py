"""chat: one question, or a talk, with the answer shown as it comes."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import Any

import click

from vllm_server_client.cli import loading, words
from vllm_server_client.cli.complete import model_words
from vllm_server_client.cli.terminal import Command, Terminal, pass_terminal
from vllm_server_client.client import VLLMProxyClient
from vllm_server_client.errors import AuthenticationFailed, NotFound, PermissionDenied, ServerError, VLLMProxyError

ANSWER_TIMEOUT_S = 600.0
HELP = "/clear forgets what was said, /exit or Ctrl-D leaves, Ctrl-C ends an answer"


@click.command(cls=Command)
@click.argument("model", shell_complete=model_words)
@click.argument("prompt", nargs=-1)
@click.option("-s", "--system", metavar="TEXT", help="A system message.")
@click.option("-t", "--temperature", type=click.FloatRange(0), help="0 for the most likely words.")
@click.option("-m", "--max-tokens", type=click.IntRange(1), help="Longest answer.")
@click.option("--stats", is_flag=True, help="Tell the time to the first token, and tokens a second.")
@pass_terminal
def chat(terminal: Terminal, model: str, prompt: tuple[str, ...], system: str | None, temperature: float | None,
         max_tokens: int | None, stats: bool) -> None:
    """Chat with a model.

    With a PROMPT, or with text on stdin, one answer is printed; else it is a talk.  With --json: the whole answer as
    the server sends it.
    """
    question = _question(prompt)
    params: dict[str, Any] = {name: value for name, value in (("temperature", temperature), ("max_tokens", max_tokens))
                              if value is not None}
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    if question is None and terminal.as_json:
        raise click.UsageError("--json needs a PROMPT")
    with terminal.client(ANSWER_TIMEOUT_S) as client:
        _wait_for(terminal, client, model)
        if question is None:
            _talk(Talk(terminal, client, model, params, messages, stats))
        elif terminal.as_json:
            messages.append({"role": "user", "content": question})
            terminal.print_json(client.chat_completion(model, messages, **params))
        else:
            Talk(terminal, client, model, params, messages, stats).ask(question)


def _question(prompt: tuple[str, ...]) -> str | None:
    """From the command line, from a pipe, or both; None: a talk."""
    given = " ".join(prompt)
    piped = "" if sys.stdin.isatty() else sys.stdin.read().strip()
    question = "\n\n".join(filter(None, (given, piped)))
    if not question and not sys.stdin.isatty():
        raise click.UsageError("there is no question: give a PROMPT, or text on stdin")
    return question or None


def _wait_for(terminal: Terminal, client: VLLMProxyClient, model: str) -> None:
    """Load the model if need be, and show how far it is.  Who may not look is served without that.

    What is not there is left to the request, whose answer says so.
    """
    with suppress(AuthenticationFailed, PermissionDenied, NotFound):
        found = client.model(model)
        if found["status"] == "ready":
            return
        pending = [one["id"] for one in found["instances"] if one["status"] in loading.LOADING]
        one, expected_s = (client.instance(pending[0]), None) if pending else loading.begin(client, model)
        loading.until_ready(terminal, client, one, timeout_s=None, expected_s=expected_s)


class Talk:
    """What was said so far, and how the next answer is fetched and shown."""

    def __init__(self, terminal: Terminal, client: VLLMProxyClient, model: str, params: dict[str, Any],
                 messages: list[dict[str, Any]], stats: bool) -> None:
        self.terminal, self.client, self.model = terminal, client, model
        self.params, self.messages, self.stats = params, messages, stats

    def ask(self, question: str) -> None:
        """Raises VLLMProxyError and KeyboardInterrupt; then the question is forgotten."""
        self.messages.append({"role": "user", "content": question})
        answer: list[str] = []
        try:
            for text in self._pieces():
                answer.append(text)
                click.echo(words.plain(text) if self.terminal.out.is_terminal else text, nl=False)
                sys.stdout.flush()
        except BaseException:
            self.messages.pop()
            raise
        finally:
            if answer:
                click.echo()
        self.messages.append({"role": "assistant", "content": "".join(answer)})

    def _pieces(self) -> Iterator[str]:
        asked = time.monotonic()
        first = tokens = None
        stream = self.client.chat_completion_chunks(self.model, self.messages, **self.params,
                                                    stream_options={"include_usage": True})
        with closing(stream):
            for chunk in stream:
                if text := chunk["choices"][0]["delta"].get("content") if chunk["choices"] else None:
                    first = first or time.monotonic()
                    yield text
                if usage := chunk.get("usage"):
                    tokens = usage.get("completion_tokens")
        if self.stats and first is not None and tokens is not None:
            rate = (tokens - 1) / max(time.monotonic() - first, 1e-6)
            self.terminal.say(f"\n{tokens} tokens, the first after {first - asked:.2f} s, then {rate:.0f} a second",
                              "dim")


def _talk(talk: Talk) -> None:
    import readline  # noqa: F401  input() edits lines and remembers them

    terminal = talk.terminal
    terminal.say(HELP, "dim")
    system = [message for message in talk.messages if message["role"] == "system"]
    while True:
        try:
            line = input(">>> ").strip()
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            terminal.say(f"\n{HELP}", "dim")
            continue
        if line in ("/exit", "/quit", "/bye"):
            return
        if line == "/clear":
            talk.messages = list(system)
        elif line.startswith("/"):
            terminal.say(HELP, "dim")
        elif line:
            _answer(talk, line)


def _answer(talk: Talk, line: str) -> None:
    try:
        talk.ask(line)
    except KeyboardInterrupt:
        talk.terminal.say("(ended)", "dim")
    except ServerError as error:
        talk.terminal.report(error)
        if isinstance(error, AuthenticationFailed | PermissionDenied):
            raise
    except VLLMProxyError as error:
        talk.terminal.report(error)
