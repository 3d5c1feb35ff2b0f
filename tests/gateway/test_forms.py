"""Forms with a sound: the model that a gateway reads in them, and which keys may use it."""

from __future__ import annotations

import pytest

from modelpack_server.gateway.bodies import look_into_form
from modelpack_server.gateway.forms import Form, FormError
from tests.gateway.houses import House

TYPE = "multipart/form-data; boundary=x"
PATH = "/v1/audio/transcriptions"


def part(value: str, disposition: str, *headers: str) -> str:
    lines = [f"Content-Disposition: {disposition}", *headers]
    return "--x\r\n" + "".join(f"{line}\r\n" for line in lines) + f"\r\n{value}\r\n"


def field(name: str, value: str) -> str:
    return part(value, f'form-data; name="{name}"')


def form(*parts: str) -> bytes:
    sound = part("sound" * 1000, 'form-data; name="file"; filename="a.wav"')
    return f"{sound}{''.join(parts)}--x--\r\n".encode()


MODEL = field("model", "ai/smollm2")


def test_the_model_in_a_form() -> None:
    asked = look_into_form(form(field("language", "en"), MODEL), TYPE)
    assert (asked.models, asked.ambiguous, asked.valid) == (("ai/smollm2",), False, True)
    assert asked.fields == {"model"}
    assert asked.prompt_tokens > 5000 // 256
    assert look_into_form(form(), TYPE).fields == frozenset()


@pytest.mark.sample(7)
@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (form(MODEL), 200, ""),
        (form(field("model", "other")), 403, "may not use the model 'other'"),
        (form(MODEL, field("model", "other")), 400, "model: expected exactly one name"),
        (form(MODEL, field("model", "")), 400, "model: expected exactly one name"),
        (form(field("Model", "other"), MODEL), 400, "model: expected exactly one name"),
        (form(field("name", "ai/smollm2")), 400, "model: expected exactly one name"),
        (form(field("model", "")), 400, "model: expected exactly one name"),
        (form(), 400, "model: expected exactly one name"),
        (form(part("other", 'form-data; name="a"; name="model"'), MODEL), 400, "not a valid form"),
        (form(part("other", "form-data; name*=utf-8''model"), MODEL), 400, "not a valid form"),
        (
            form(part("other", 'form-data; name="a"', 'Content-Disposition: x; name="model"')),
            400,
            "not a valid form",
        ),
        (form(part("other", 'form-data; name="model"; filename="a"'), MODEL), 400, "not a valid"),
        (form(MODEL)[:-9], 400, "not a valid form"),
        (b'{"model": "ai/smollm2"}', 400, "not a valid form"),
        (b"", 400, "not a valid form"),
    ],
)
@pytest.mark.parametrize("path", [PATH, "/engines/v1/audio/translations"])
def test_a_narrow_key_uses_its_models(
    house: House, path: str, body: bytes, status: int, message: str
) -> None:
    headers = {"x-api-key": house.secrets["narrow"], "Content-Type": TYPE}
    reply = house.served.client.post(path, content=body, headers=headers)
    assert reply.status_code == status, reply.text
    assert message in reply.text


@pytest.mark.parametrize(
    "disposition",
    [
        'form-data; name="model"; filename="x"; name="file"',
        'form-data; name="file"; filename="x"; name="file"',
        'form-data; name="file"; filename=x ;NAME=file',
        "form-data; name=\"file\"; filename=x; name*=utf-8''model",
    ],
)
def test_a_file_has_one_name(disposition: str) -> None:
    body = f"{part('sound', disposition)}{MODEL}--x--\r\n".encode()
    assert not look_into_form(body, TYPE).valid
    one = part("sound", 'form-data; name="file"; filename="a name=b; names.wav"')
    assert look_into_form(f"{one}{MODEL}--x--\r\n".encode(), TYPE).valid


@pytest.mark.parametrize("content_type", ["", "multipart/form-data", "text/plain; boundary=x"])
def test_other_media_types(content_type: str) -> None:
    with pytest.raises(FormError, match="expected a form"):
        Form(content_type)
    assert not look_into_form(form(MODEL), content_type).valid
