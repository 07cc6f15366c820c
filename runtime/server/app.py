"""The HTTP application over an engine; whoever hosts it, a process of ours or Ray Serve, sees to its life.

app = create_app(engine, ServerSettings())

The application refuses requests once `begin_closing` was called; closing the engine is the host's.
"""

import hashlib

from fastapi import Depends, FastAPI

from c2c_export import __version__
from c2c_export.errors import UsageError
from runtime.server import bundle_info, chat, completions, health, models
from runtime.server.api_keys import ApiKeys, KeysBeforeBodies
from runtime.server.error_handlers import add_error_handlers
from runtime.server.limits import BodyLimit, OneLength
from runtime.server.metrics import HttpMetrics, ServerMetrics
from runtime.server.openapi import complete_document
from runtime.server.page_files import add_page
from runtime.server.request_log import RequestLog
from runtime.server.request_target import PathOfTarget
from runtime.server.served_engine import ServedEngine
from runtime.server.served_models import ServedModels
from runtime.server.service import Service
from runtime.server.settings import ServerSettings

_DESCRIPTION = """\
OpenAI's API for chats and completions over a Cache-to-Cache bundle: two language models, of which one reads the prompt
for the other. Fields marked "Extra" are not OpenAI's. docs/serving.md says what is served, and what is not.
"""


def create_app(engine: ServedEngine, settings: ServerSettings, metrics: HttpMetrics | None = None) -> FastAPI:
    """The application. `metrics` are those that the engine was given as its observer; else /metrics lacks its part.

    Raises `UsageError` where a limit does not go with the bundle.
    """
    capacity = engine.bundle.manifest.max_length
    if settings.max_tokens is not None and settings.max_tokens > capacity:
        raise UsageError(f"max_tokens: {settings.max_tokens} is more than the bundle's capacity of {capacity}")
    name = settings.model_name or engine.bundle.root.resolve().stem
    service = Service(
        engine=engine,
        settings=settings,
        models=ServedModels(name, f"{name}-receiver", len(engine.bundle.manifest.sharers)),
        metrics=metrics or ServerMetrics(),
        system_fingerprint=_fingerprint(engine),
    )
    # Their own pages of documentation load scripts from elsewhere.
    app = FastAPI(
        title="c2c-export",
        version=__version__,
        description=_DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service = service
    keys = ApiKeys(settings.api_keys) if settings.api_keys else None
    guarded = (chat, completions, models, bundle_info)
    for module in guarded:
        app.include_router(module.router, dependencies=[Depends(keys.dependency)] if keys else [])
    app.include_router(health.router)
    add_page(app)
    add_error_handlers(app)
    # The last one added is the outermost.
    app.add_middleware(BodyLimit, max_body=settings.max_body)
    if keys:
        app.add_middleware(KeysBeforeBodies, keys=keys)
    app.add_middleware(OneLength)
    routes = [route for module in (*guarded, health) for route in module.router.routes]
    app.add_middleware(RequestLog, metrics=service.metrics, routes=routes)
    app.add_middleware(PathOfTarget)
    complete_document(app, service.models, settings.max_priority)
    return app


def begin_closing(app: FastAPI) -> None:
    """From now on `app` refuses what begins, with 503, and is not ready; what runs goes on.

    To be called before the engine is closed.
    """
    app.state.service.begin_closing()


def _fingerprint(engine: ServedEngine) -> str:
    record = engine.engine_choice.record
    content = f"{engine.bundle.manifest.model_dump_json()} {record.target} {record.precision}"
    return f"fp_{hashlib.sha256(content.encode()).hexdigest()[:12]}"
