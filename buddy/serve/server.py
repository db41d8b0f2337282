"""`buddy serve`: a run behind OpenAI's HTTP interface. Needs the extra `serve`, which nothing else imports."""

from __future__ import annotations

import logging
import signal
import socket
from pathlib import Path
from types import FrameType
from typing import Any

from buddy.console import status, stderr
from buddy.errors import BuddyError, DataError, reason
from buddy.hub.load import Model, load
from buddy.run import read_run

DRAIN = 60  # seconds that running requests have after SIGTERM


def serve(
    folder: Path,
    *,
    budget: str = "1.0",
    prompt_budget: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key_file: Path | None = None,
    batch_plan: str | None = None,
    dtype: str | None = None,
    **limits: Any,
) -> None:
    """Serve until SIGTERM or Ctrl-C; requests that run then are finished.

    Args:
        folder: a finished run.
        budget: where a request names none.
        prompt_budget: of prompts, where a request names none; None for the request's budget.
        host, port: of the socket; port 0 takes a free one.
        api_key_file: API keys, one a line.
        batch_plan: as for `make_app`.
        dtype: as for `buddy.load`.
        limits: of requests, the fields of `buddy.serve.app.Limits`.

    Raises:
        BuddyError: the extra is missing, or the run, the budget, the keys or the address cannot be used.
    """
    try:
        import uvicorn

        from buddy.serve.app import Limits, make_app
    except ImportError as error:
        raise BuddyError(
            f"`buddy serve` needs more packages ({error}); install Buddy with its extra `serve`."
        ) from error
    of_requests, keys = Limits(**limits), read_keys(api_key_file) if api_key_file else []
    listening = _bind(host, port)
    with listening:

        def load_run() -> Model:
            with status(f"Loading {folder} …"):
                return load(folder, dtype=dtype)

        budgets = read_run(folder).recipe.budgets
        app = make_app(load_run, budget, budgets, of_requests, keys, batch_plan, prompt_budget)
        name = f"[{host}]" if ":" in host else host
        stderr.print(f"Serving {folder} at http://{name}:{listening.getsockname()[1]}, budget {budget} by default.")
        # uvicorn stops taking requests on this signal, waits for those that run, and sends it again when it has ended.
        signal.signal(signal.SIGTERM, lambda *_: None)
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=DRAIN)

        class Server(uvicorn.Server):
            def handle_exit(self, sig: int, frame: FrameType | None) -> None:
                first = not self.should_exit
                super().handle_exit(sig, frame)  # before the message: the next signal may come while it is printed
                if first:
                    stderr.print(f"Finishing the requests that run, for at most {DRAIN} s; Ctrl-C stops at once.")
                else:  # uvicorn logs the traceback of the interrupt and of each request
                    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL + 1)

        try:
            Server(config).run(sockets=[listening])
        finally:
            app.state.scheduler.close()  # after a second Ctrl-C uvicorn does not end the application


def read_keys(file: Path) -> list[str]:
    """The keys in a file, one a line; empty lines do not count.

    Raises:
        DataError: the file cannot be read, or it has no key.
    """
    try:
        keys = [line.strip() for line in file.read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The API keys in {file} cannot be read ({reason(error)}); name a text file.") from error
    if not keys or not all(key.isascii() for key in keys):
        raise DataError(f"{file} has no API key, or one that is not ASCII; write one a line.")
    return keys


def _bind(host: str, port: int) -> socket.socket:
    """A socket, before the model is loaded, so that a taken port is known at once."""
    try:
        family, *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:
        raise BuddyError(f"{host}:{port} cannot be used ({reason(error)}); choose another --port or --host.") from error
