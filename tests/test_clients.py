"""The official clients against a server on loopback: list, chat, stream, tools, schema, embeddings, an error."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import ollama
import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_ollama import ChatOllama, OllamaEmbeddings
from pydantic import BaseModel

from ollama_forge.serving.engine.base import EngineRequest
from tests.loopback import THINKING, TOOLS, loopback, scripted

SAID = "Hé, world."
CALL = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
ASKED: Any = [{"role": "user", "content": "Say hello."}]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: Any = {"type": "function", "function": {"name": "get_weather", "description": "Weather", "parameters": CITY}}
MAX = 200


class Person(BaseModel):
    name: str
    age: int


def say(request: EngineRequest, prompt: str) -> str:
    if request.constraint is not None:
        return '{"name": "Ann", "age": 31}'
    if "get_weather" in prompt and "<|tool|>" not in prompt:
        return CALL
    return "It is mild." if "<|tool|>" in prompt else SAID


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with loopback(scripted(say, template=TOOLS)) as base:
        yield base


@pytest.fixture(scope="module")
def thinking_url() -> Iterator[str]:
    with loopback(scripted(lambda *_: "Hm.</think>" + SAID, template=THINKING)) as base:
        yield base


def is_unit(vector: Any) -> bool:
    return len(vector) > 1 and math.isclose(sum(x * x for x in vector), 1.0, rel_tol=1e-3)


# --- ollama, Python


def test_ollama(url: str) -> None:
    client = ollama.Client(url)
    assert [model.model for model in client.list().models] == ["wire:latest"]
    assert "tools" in (client.show("wire").capabilities or [])
    answer = client.chat("wire", ASKED)
    assert (answer.message.content, answer.done_reason) == (SAID, "stop")
    assert "".join(part.message.content or "" for part in client.chat("wire", ASKED, stream=True)) == SAID
    assert client.generate("wire", "Say hello.").response == SAID
    assert "".join(part.response for part in client.generate("wire", "Say hello.", stream=True)) == SAID
    said = client.chat("wire", ASKED, format=Person.model_json_schema()).message.content
    assert Person.model_validate_json(said or "") == Person(name="Ann", age=31)
    assert [model.model for model in client.ps().models] == ["wire:latest"]


def test_ollama_tools(url: str) -> None:
    client = ollama.Client(url)
    answer = client.chat("wire", ASKED, tools=[WEATHER])
    (call,) = answer.message.tool_calls or []
    assert (call.function.name, call.function.arguments) == ("get_weather", {"city": "Paris"})
    told = [*ASKED, answer.message, {"role": "tool", "tool_name": "get_weather", "content": "11"}]
    assert client.chat("wire", told, tools=[WEATHER]).message.content == "It is mild."
    parts = list(client.chat("wire", ASKED, tools=[WEATHER], stream=True))
    assert [c.function.name for part in parts for c in part.message.tool_calls or []] == ["get_weather"]


def test_ollama_embeds(url: str) -> None:
    vectors = ollama.Client(url).embed("wire", ["a", "b"]).embeddings
    assert len(vectors) == 2
    assert all(map(is_unit, vectors))


def test_ollama_errors(url: str) -> None:
    client = ollama.Client(url)
    with pytest.raises(ollama.ResponseError, match="model 'nosuch' not found") as caught:
        client.chat("nosuch", ASKED)
    assert caught.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="not found"):
        list(client.chat("nosuch", ASKED, stream=True))
    with pytest.raises(ollama.ResponseError, match="does not support thinking"):
        client.chat("wire", ASKED, think=True)


def test_ollama_thinks(thinking_url: str) -> None:
    client = ollama.Client(thinking_url)
    message = client.chat("wire", ASKED, think=True).message
    assert (message.thinking, message.content) == ("Hm.", SAID)
    parts = list(client.chat("wire", ASKED, think=True, stream=True))
    assert "".join(part.message.thinking or "" for part in parts) == "Hm."


def test_ollama_asynchronously(url: str) -> None:
    async def run() -> None:
        client = ollama.AsyncClient(url)
        assert (await client.list()).models[0].model == "wire:latest"
        answers = await asyncio.gather(*[client.chat("wire", ASKED) for _ in range(5)])
        assert {answer.message.content for answer in answers} == {SAID}
        stream = await client.chat("wire", ASKED, stream=True)
        assert "".join([part.message.content or "" async for part in stream]) == SAID
        (call,) = (await client.chat("wire", ASKED, tools=[WEATHER])).message.tool_calls or []
        assert call.function.arguments == {"city": "Paris"}
        said = (await client.chat("wire", ASKED, format=Person.model_json_schema())).message.content
        assert json.loads(said or "")["age"] == 31
        assert is_unit((await client.embed("wire", "a")).embeddings[0])
        with pytest.raises(ollama.ResponseError, match="not found"):
            await client.generate("nosuch", "a")

    asyncio.run(run())


# --- openai


@pytest.fixture
def gpt(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        yield client


def test_openai_models(gpt: openai.OpenAI) -> None:
    assert [model.id for model in gpt.models.list()] == ["wire:latest"]
    assert gpt.models.retrieve("wire").owned_by == "library"
    with pytest.raises(openai.NotFoundError, match="not found"):
        gpt.models.retrieve("nosuch")


def test_openai_chat(gpt: openai.OpenAI) -> None:
    answer = gpt.chat.completions.create(model="wire", messages=ASKED, logprobs=True, top_logprobs=2)
    assert answer.choices[0].message.content == SAID
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    tokens = answer.choices[0].logprobs
    assert tokens is not None
    assert bytes(b for token in tokens.content or [] for b in token.bytes or []).decode() == SAID
    stream = gpt.chat.completions.create(
        model="wire", messages=ASKED, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == SAID
    assert chunks[-1].usage == answer.usage


def test_openai_tools(gpt: openai.OpenAI) -> None:
    answer = gpt.chat.completions.create(model="wire", messages=ASKED, tools=[WEATHER])
    (choice,) = answer.choices
    (call,) = choice.message.tool_calls or []
    assert choice.finish_reason == "tool_calls"
    assert call.type == "function"
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    told = [*ASKED, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "11"}]
    after = gpt.chat.completions.create(model="wire", messages=told, tools=[WEATHER])
    assert after.choices[0].message.content == "It is mild."
    with gpt.chat.completions.stream(model="wire", messages=ASKED, tools=[WEATHER]) as stream:
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls or []
    assert json.loads(streamed.function.arguments) == {"city": "Paris"}


def test_openai_schema(gpt: openai.OpenAI) -> None:
    parsed = gpt.chat.completions.parse(model="wire", messages=ASKED, response_format=Person)
    assert parsed.choices[0].message.parsed == Person(name="Ann", age=31)


def test_openai_completions_and_embeddings(gpt: openai.OpenAI) -> None:
    assert gpt.completions.create(model="wire", prompt="Say hello.").choices[0].text == SAID
    stream = gpt.completions.create(model="wire", prompt="Say hello.", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == SAID
    vectors = [one.embedding for one in gpt.embeddings.create(model="wire", input=["a", "b"]).data]
    plain = gpt.embeddings.create(model="wire", input="a", encoding_format="float").data[0].embedding
    assert len(vectors) == 2
    assert all(map(is_unit, vectors))
    assert vectors[0] == pytest.approx(plain, abs=1e-6)


def test_openai_responses(gpt: openai.OpenAI) -> None:
    assert gpt.responses.create(model="wire", input="Say hello.").output_text == SAID
    with gpt.responses.stream(model="wire", input="Say hello.") as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        assert stream.get_final_response().output_text == "".join(deltas) == SAID
    tool: Any = {"type": "function", "name": "get_weather", "parameters": CITY, "strict": False}
    first = gpt.responses.create(model="wire", input="Weather?", tools=[tool])
    (call,) = first.output
    assert call.type == "function_call"
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "11"}
    told: Any = [{"role": "user", "content": "Weather?"}, call.model_dump(), result]
    assert gpt.responses.create(model="wire", input=told, tools=[tool]).output_text == "It is mild."
    assert gpt.responses.parse(model="wire", input="Who?", text_format=Person).output_parsed == Person(
        name="Ann", age=31
    )


def test_openai_thinks(thinking_url: str) -> None:
    with openai.OpenAI(base_url=f"{thinking_url}/v1", api_key="any") as client:
        message = (
            client.chat.completions.create(model="wire", messages=ASKED, reasoning_effort="high").choices[0].message
        )
        assert (message.model_extra, message.content) == ({"reasoning": "Hm."}, SAID)
        with client.responses.stream(model="wire", input="Say hello.") as stream:
            response = stream.get_final_response()
    thought, said = response.output
    assert thought.type == "reasoning"
    assert (thought.summary[0].text, response.output_text, said.type) == ("Hm.", SAID, "message")


def test_openai_errors(gpt: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="model 'nosuch' not found"):
        gpt.chat.completions.create(model="nosuch", messages=ASKED)
    with pytest.raises(openai.BadRequestError, match="does not support thinking"):
        gpt.chat.completions.create(model="wire", messages=ASKED, reasoning_effort="high", stream=True)
    with pytest.raises(openai.BadRequestError, match="invalid input"):
        gpt.embeddings.create(model="wire", input=[])


def test_openai_sees_an_error_in_a_stream() -> None:
    with loopback(scripted(lambda *_: SAID, fail_after=3)) as base:
        client = openai.OpenAI(base_url=f"{base}/v1", api_key="any", max_retries=0)
        with pytest.raises(openai.APIError, match="the engine failed"):
            list(client.chat.completions.create(model="wire", messages=ASKED, stream=True))


# --- anthropic


@pytest.fixture
def claude(url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key="any", max_retries=0) as client:
        yield client


def test_anthropic_messages(claude: anthropic.Anthropic) -> None:
    answer = claude.messages.create(model="wire", max_tokens=MAX, messages=ASKED, extra_body={"temperature": 0})
    (block,) = answer.content
    assert block.type == "text"
    assert (block.text, answer.stop_reason) == (SAID, "end_turn")
    with claude.messages.stream(model="wire", max_tokens=MAX, messages=ASKED, system="Be brief.") as stream:
        assert "".join(stream.text_stream) == SAID
        assert stream.get_final_message().usage.output_tokens == answer.usage.output_tokens


def test_anthropic_tools(claude: anthropic.Anthropic) -> None:
    tools: Any = [{"name": "get_weather", "description": "Weather", "input_schema": CITY}]
    answer = claude.messages.create(model="wire", max_tokens=MAX, messages=ASKED, tools=tools)
    (call,) = answer.content
    assert call.type == "tool_use"
    assert (call.name, call.input, answer.stop_reason) == ("get_weather", {"city": "Paris"}, "tool_use")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "11"}
    told = [*ASKED, {"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
    (block,) = claude.messages.create(model="wire", max_tokens=MAX, messages=told, tools=tools).content
    assert block.type == "text"
    assert block.text == "It is mild."
    with claude.messages.stream(model="wire", max_tokens=MAX, messages=ASKED, tools=tools) as stream:
        (streamed,) = stream.get_final_message().content
    assert streamed.type == "tool_use"
    assert streamed.input == {"city": "Paris"}


def test_anthropic_thinks(thinking_url: str, claude: anthropic.Anthropic) -> None:
    thinking: Any = {"type": "enabled", "budget_tokens": 1024}
    with anthropic.Anthropic(base_url=thinking_url, api_key="any") as client:
        answer = client.messages.create(model="wire", max_tokens=2000, messages=ASKED, thinking=thinking)
        assert [block.type for block in answer.content] == ["thinking", "text"]
        with client.messages.stream(model="wire", max_tokens=2000, messages=ASKED, thinking=thinking) as stream:
            thought, said = stream.get_final_message().content
    assert thought.type == "thinking"
    assert said.type == "text"
    assert (thought.thinking, said.text) == ("Hm.", SAID)
    relaxed = claude.messages.create(model="wire", max_tokens=2000, messages=ASKED, thinking=thinking)
    assert [block.type for block in relaxed.content] == ["text"]


def test_anthropic_errors(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="model 'nosuch' not found"):
        claude.messages.create(model="nosuch", max_tokens=5, messages=ASKED)
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        claude.messages.create(model="wire", max_tokens=0, messages=ASKED)


def test_anthropic_sees_an_error_in_a_stream() -> None:
    with loopback(scripted(lambda *_: SAID, fail_after=3)) as base:
        client = anthropic.Anthropic(base_url=base, api_key="any", max_retries=0)
        stream = client.messages.create(model="wire", max_tokens=MAX, messages=ASKED, stream=True)
        with pytest.raises(anthropic.APIStatusError, match="the engine failed"):
            list(stream)


# --- langchain-ollama


def test_langchain(url: str) -> None:
    chat = ChatOllama(model="wire", base_url=url, validate_model_on_init=True)
    assert chat.invoke("Say hello.").content == SAID
    assert "".join(str(chunk.content) for chunk in chat.stream("Say hello.")) == SAID
    assert chat.with_structured_output(Person, method="json_schema").invoke("Who?") == Person(name="Ann", age=31)
    vectors = OllamaEmbeddings(model="wire", base_url=url).embed_documents(["a", "b"])
    assert len(vectors) == 2
    assert all(map(is_unit, vectors))
    with pytest.raises(ollama.ResponseError, match="not found"):
        ChatOllama(model="nosuch", base_url=url).invoke("Say hello.")


def test_langchain_tools(url: str) -> None:
    chat = ChatOllama(model="wire", base_url=url).bind_tools([WEATHER])
    asked = HumanMessage("Weather in Paris?")
    answer = chat.invoke([asked])
    assert isinstance(answer, AIMessage)
    (call,) = answer.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Paris"})
    after = chat.invoke([asked, answer, ToolMessage("11", tool_call_id=str(call["id"]))])
    assert after.content == "It is mild."


def test_langchain_thinks(thinking_url: str) -> None:
    answer = ChatOllama(model="wire", base_url=thinking_url, reasoning=True).invoke("Say hello.")
    assert (answer.additional_kwargs["reasoning_content"], answer.content) == ("Hm.", SAID)


# --- ollama, JavaScript

SCRIPT = """
import { Ollama } from 'ollama'
const client = new Ollama({ host: process.argv[2] })
const { messages, tools, schema } = JSON.parse(process.argv[3])
const chat = async (more) => (await client.chat({ model: 'wire', messages, ...more })).message
const found = {}
found.list = (await client.list()).models.map((model) => model.model)
found.chat = (await chat({})).content
found.stream = ''
for await (const part of await client.chat({ model: 'wire', messages, stream: true })) {
  found.stream += part.message.content
}
found.tools = (await chat({ tools })).tool_calls.map((call) => call.function.arguments)
found.schema = JSON.parse((await chat({ format: schema })).content)
found.embeddings = (await client.embed({ model: 'wire', input: ['a', 'b'] })).embeddings.length
try {
  await chat({ model: 'nosuch' })
} catch (error) {
  found.error = [error.status_code, error.message]
}
console.log(JSON.stringify(found))
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("node or npm is not installed: the JavaScript client was not tried")
    folder = tmp_path_factory.mktemp("npm")
    (folder / "package.json").write_text('{"private": true, "type": "module"}', encoding="utf-8")
    (folder / "client.js").write_text(SCRIPT, encoding="utf-8")
    options = ["--no-audit", "--no-fund", "--ignore-scripts", "--fetch-retries=1", "--fetch-timeout=20000"]
    try:
        done = subprocess.run([npm, "install", *options, "ollama"], cwd=folder, capture_output=True, timeout=120)
    except subprocess.TimeoutExpired:
        pytest.skip("npm did not finish: the JavaScript client was not tried")
    if done.returncode != 0:
        pytest.skip("npm could not install the package ollama: the JavaScript client was not tried")
    return folder


def test_ollama_javascript(url: str, package: Path) -> None:
    asked = json.dumps({"messages": ASKED, "tools": [WEATHER], "schema": Person.model_json_schema()})
    command = ["node", "client.js", url, asked]
    done = subprocess.run(command, cwd=package, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "list": ["wire:latest"],
        "chat": SAID,
        "stream": SAID,
        "tools": [{"city": "Paris"}],
        "schema": {"name": "Ann", "age": 31},
        "embeddings": 2,
        "error": [404, "model 'nosuch' not found"],
    }
