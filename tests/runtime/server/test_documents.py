"""What the server says of itself: models, bundle, page, and the OpenAPI document, which schemathesis holds it to."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)
from served import Served, refused, served_here

from c2c_export.bundle import Bundle
from runtime.async_engine import AsyncC2CEngine
from runtime.server.page_files import PAGE

PAIR = "qwen3_from_llama_aligned"

pytestmark = pytest.mark.xdist_group(PAIR)


def test_models_are_c2c_and_the_receiver_alone(server: Served):
    with server.openai() as client:
        models = list(client.models.list())
        assert [model.id for model in models] == [PAIR, f"{PAIR}-receiver"]
        for model in models:
            assert client.models.retrieve(model.id) == model
            assert (model.object, model.max_model_len) == ("model", 256)


def test_a_models_name_may_have_a_slash(engine: AsyncC2CEngine):
    with served_here(engine, model_name="team/pair") as served, served.openai() as client:
        assert client.models.retrieve("team/pair").id == "team/pair"


def test_the_bundle_is_described_with_the_gates_of_its_manifest(server: Served, engine: AsyncC2CEngine):
    with server.http() as client:
        info = client.get("/v1/c2c").json()
    manifest = engine.bundle.manifest
    assert (info["bundle"], info["engine"], info["precision"]) == (PAIR, "ort-cpu", "fp32")
    assert (info["capacity"], info["max_tokens"], info["num_slots"]) == (256, 256, 4)
    assert info["models"] == {"c2c": PAIR, "receiver": f"{PAIR}-receiver"}
    assert info["receiver"] == {"name": "receiver", "num_layers": manifest.receiver.num_layers}
    [sharer] = info["sharers"]
    assert (sharer["number"], sharer["num_layers"]) == (0, manifest.sharers[0].model.num_layers)
    # Against the manifest's own JSON, not through our models.
    links = json.loads((engine.bundle.root / "manifest.json").read_text())["sharers"][0]["links"]
    assert sharer["layers"] == [
        {
            "receiver_layer": link["receiver_layer"],
            "sharer_layer": link["sharer_layer"],
            "key": link["key_gate_open"],
            "value": link["value_gate_open"],
        }
        for link in sorted(links, key=lambda link: link["receiver_layer"])
    ]
    assert str(Path(manifest.receiver.source).parent) not in json.dumps(info)


def test_a_bundle_of_one_model_has_one_name(engine: AsyncC2CEngine, monkeypatch: pytest.MonkeyPatch):
    bundle = engine.bundle
    alone = Bundle(bundle.root, bundle.manifest.model_copy(update={"sharers": ()}))
    monkeypatch.setattr(type(engine), "bundle", property(lambda _: alone))
    with served_here(engine, model_name="m") as served, served.http() as client:
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["m"]
        assert client.get("/v1/c2c").json()["models"] == {"c2c": "m", "receiver": None}
        refused(client.get("/v1/models/m-receiver"), 404)


# --- the page ---


def test_the_page_and_all_that_it_loads_come_from_this_server(server: Served):
    with server.http() as client:
        page = client.get("/")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        loaded = re.findall(r'(?:src|href)="([^"#]+)"', page.text)
        assert loaded
        for path in loaded:
            assert client.get(f"/{path}").status_code == 200, path
        for file in PAGE.iterdir():
            response = client.get("/" if file.name == "index.html" else f"/{file.name}")
            assert response.content == file.read_bytes()
            kinds = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
            assert response.headers["content-type"].split(";")[0] == kinds[file.suffix]
            policy = response.headers["content-security-policy"]
            assert policy.startswith("default-src 'none'; script-src 'self'")
            assert not re.search(r"https?:|\*|unsafe", policy)
            assert response.headers["x-content-type-options"] == "nosniff"
        assert client.head("/").status_code == 200


def test_there_is_no_page_that_loads_scripts_from_elsewhere(server: Served):
    with server.http() as client:
        for path in ("/docs", "/redoc"):
            refused(client.get(path), 404)


# --- the OpenAPI document ---

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
    negative_data_rejection,
    unsupported_method,
]
"""Not that all data of the right form is accepted: which fields go together, and what has room, no form can say."""


@pytest.fixture(scope="module")
def api(engine: AsyncC2CEngine) -> Any:
    with served_here(engine, model_name="m", max_tokens=4) as served:
        yield schemathesis.openapi.from_url(f"{served.url}/openapi.json")


OPERATIONS = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("GET", "/v1/c2c"),
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/metrics"),
]


def test_the_document_has_every_operation(api: Any):
    found = {(operation.ok().method.upper(), operation.ok().path) for operation in api.get_all_operations()}
    assert found == set(OPERATIONS)


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [
        pytest.param(method, path, mode, id=f"{method} {path} {mode.value}")
        for method, path in OPERATIONS
        for mode in schemathesis.GenerationMode
        if method == "POST" or mode is schemathesis.GenerationMode.POSITIVE  # a GET takes nothing that could be wrong
    ],
)
def test_the_server_keeps_to_its_openapi_document(method: str, path: str, mode: Any, api: Any):
    operation = api[path][method]
    num_examples = 60 if method == "POST" else 10
    statuses: list[int] = []

    @settings(
        max_examples=num_examples,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        response = case.call()
        statuses.append(response.status_code)
        case.validate_response(response, checks=CHECKS)

    run()
    assert statuses
    if method == "POST" and mode is schemathesis.GenerationMode.POSITIVE:
        assert 200 in statuses


def test_the_document_names_models_errors_and_keys(api: Any, engine: AsyncC2CEngine):
    document = api.raw_schema
    chat = document["paths"]["/v1/chat/completions"]["post"]
    expected = {"200", "400", "401", "404", "408", "413", "429", "500", "503", "4XX"}
    assert set(chat["responses"]) == expected
    assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    assert document["components"]["schemas"]["ChatRequest"]["properties"]["model"]["enum"] == ["m", "m-receiver"]
    assert "422" not in json.dumps(document)
    assert "securitySchemes" not in document["components"]
    with served_here(engine, api_keys=("k",)) as served, served.http() as client:
        guarded = client.get("/openapi.json").json()
    assert guarded["paths"]["/v1/chat/completions"]["post"]["security"] == [{"HTTPBearer": []}]
    assert "security" not in guarded["paths"]["/health"]["get"]
