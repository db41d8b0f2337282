"""A server on a free port of this machine with a tiny random model."""

import threading
import time
from contextlib import contextmanager

import pytest

from buddy.engine.model import RoutedLM, geometry_of
from buddy.hub.load import Model
from tests.engine.reference import Fickle
from tests.tiny import tiny_backbone

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}:{{ m['content'] }}]{% endfor %}"


def tiny(router=Fickle) -> Model:
    backbone = tiny_backbone("llama")
    backbone.tokenizer.chat_template = TEMPLATE
    backbone.model.generation_config.eos_token_id = None
    return Model(RoutedLM(backbone, router(geometry_of(backbone))))


@contextmanager
def serving(model: Model, batch_plan="row", **options):
    """The address of a server, and its application; no text depends on another unless they share plans."""
    import uvicorn

    from buddy.serve.app import make_app

    app = make_app(lambda: model, batch_plan=batch_plan, **options)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}", app
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def alone():
    """Another copy of the model that is served."""
    return tiny()


@pytest.fixture(scope="session")
def address():
    with serving(tiny(), budgets=["1", "0.5"]) as (url, _):
        yield url
