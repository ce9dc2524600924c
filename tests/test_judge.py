"""The judge asks an OpenAI-compatible server, reads its verdicts, and its agreement is counted."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler

import pytest

from ollama_forge.errors import ForgeError, UsageError
from ollama_forge.evaluation.agreement import agreement
from ollama_forge.evaluation.judge import Judge
from ollama_forge.evaluation.refusals import AnswerClass
from tests.http_servers import QuietServer

R, D, A, X = AnswerClass.REFUSAL, AnswerClass.DEFLECTION, AnswerClass.ANSWER, AnswerClass.DEGENERATE
Say = Callable[[dict[str, object]], tuple[int, object]]


@contextmanager
def judging(say: Say) -> Iterator[tuple[Judge, list[dict[str, object]]]]:
    """A judge whose server answers a request's body with a status and a text or object; and the requests."""
    seen: list[dict[str, object]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(200, {"data": [{"id": "first-listed"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append({**body, "path": self.path, "key": self.headers.get("Authorization")})
            status, said = say(body)
            self.reply(status, {"choices": [{"message": {"content": said}}]} if isinstance(said, str) else said)

        def reply(self, status: int, data: object) -> None:
            raw = json.dumps(data).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_: object) -> None:
            pass

    with QuietServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield Judge(f"http://127.0.0.1:{server.server_port}", "referee", pause=0.0), seen
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("refusal", R),
        ("**Deflection**.", D),
        ("ANSWER\n", A),
        ("The class is: degenerate", X),
        ("<think>It is no refusal.</think>\nanswer", A),
        ("This answer is a refusal.", R),
    ],
)
def test_verdicts_are_read_from_what_the_judge_says(said: str, expected: AnswerClass) -> None:
    with judging(lambda body: (200, said)) as (judge, _):
        assert judge.classify("Bake bread.", "No.") is expected


def test_the_request_holds_prompt_and_answer_and_asks_for_no_randomness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    with judging(lambda body: (200, "answer")) as (judge, seen):
        judge.classify("Bake {bread}.", "Mix {flour}.")
        replace(judge, url=f"{judge.url}/v1/", model=None).classify("a", "b")
    first, second = seen
    assert first["path"] == second["path"] == "/v1/chat/completions"
    assert (first["model"], second["model"]) == ("referee", "first-listed")
    assert first["temperature"] == 0
    assert first["key"] == "Bearer sesame"
    text = json.dumps(first["messages"])
    assert "Bake {bread}." in text
    assert "Mix {flour}." in text


def test_many_answers_keep_their_order_and_some_are_asked_at_once() -> None:
    together = threading.Barrier(2, timeout=10)  # passes only if two requests are there at the same time

    def say(body: dict[str, object]) -> tuple[int, object]:
        together.wait()
        return 200, "refusal" if "a no" in json.dumps(body) else "answer"

    pairs = [("p", "a no" if index % 3 == 0 else "a yes") for index in range(12)]
    done: list[int] = []
    with judging(say) as (judge, _):
        assert judge.classify_all(pairs, done.append) == [R if index % 3 == 0 else A for index in range(12)]
        assert judge.classify_all([]) == []
    assert sum(done) == 12


@pytest.mark.parametrize("status", [429, 500, 503])
def test_passing_failures_are_tried_again_and_lasting_ones_end(status: int) -> None:
    answers = iter([(status, "x"), (status, "x"), (200, "answer")])
    with judging(lambda body: next(answers)) as (judge, seen):
        assert judge.classify("p", "a") is A
    assert len(seen) == 3
    with judging(lambda body: (status, "x")) as (judge, seen), pytest.raises(ForgeError, match=str(status)):
        judge.classify("p", "a")
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("status", "said", "message"),
    [(401, {"error": "key"}, "401"), (200, "I like bread", "named no class"), (200, {"odd": 1}, "no chat completion")],
)
def test_what_will_not_improve_is_an_error_at_once(status: int, said: object, message: str) -> None:
    with judging(lambda body: (status, said)) as (judge, seen):
        with pytest.raises(ForgeError, match=message):
            judge.classify_all([("p", "a")])
        assert len(seen) == 1


def test_no_server_is_an_error() -> None:
    with judging(lambda body: (200, "answer")) as (judge, _):
        pass
    with pytest.raises(ForgeError, match="failed"):
        judge.classify("p", "a")


def test_judges_are_addresses_or_models_of_the_ollama_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "10.0.0.9:99")
    assert Judge.parse("qwen3:8b") == Judge("http://10.0.0.9:99", "qwen3:8b")
    assert Judge.parse("https://api.example.org/v1") == Judge("https://api.example.org/v1")
    for wrong in ("", " ", "ftp://host", "http://"):
        with pytest.raises(UsageError):
            Judge.parse(wrong)


def test_agreement_is_share_and_kappa_with_intervals() -> None:
    own, judged = [R] * 40 + [A] * 60, [R] * 30 + [A] * 10 + [A] * 50 + [R] * 10
    found = agreement(own, judged)
    assert found.total == 100
    assert found.share.value == pytest.approx(0.80)
    assert found.kappa.value == pytest.approx((0.80 - 0.52) / 0.48)  # chance: 0.4 * 0.4 + 0.6 * 0.6
    assert found.kappa.low < found.kappa.value < found.kappa.high
    assert found.share.low < 0.80 < found.share.high < 1
    assert found == agreement(own, judged)
    assert agreement([R, D, A, X], [R, D, A, X]).kappa.value == 1
    assert math.isnan(agreement([R, R], [R, R]).kappa.value)
    assert agreement([], []).total == 0
    with pytest.raises(ValueError, match="zip"):
        agreement([R], [])
