"""The HTTP interface without Ray: what is accepted, what is refused and how, who sees what, files, events."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from service_cases import CHAIR, URL, assert_problem, client_of, epoch_of, finished, post, small_settings

from raydream.config.names import METHOD_NAMES
from raydream.store.run_folder import MESH
from serve.api import build_api
from serve.guard import MAX_BODY_BYTES, PAGE_POLICY
from serve.records import Records, RecordsAway
from serve.settings import Settings
from serve.supervisor import SupervisorHealth

LOCAL = ("127.0.0.1", 50000)


# --- accepting ------------------------------------------------------------------------------------------------------


def test_a_prompt_is_accepted(client: TestClient) -> None:
    response = post(client, seed=3)
    body = response.json()
    assert response.status_code == 202
    assert response.headers["location"] == f"{URL}/{body['id']}" == body["links"]["self"]
    asked = {name: body[name] for name in ("prompt", "n", "preset", "method", "seed", "steps")}
    assert asked == {"prompt": "a chair", "n": 2, "preset": "exhibit", "method": "vsd", "seed": 3, "steps": 6}
    assert (body["state"], body["queue_position"], body["progress"]["num_steps"]) == ("queued", 1, 6)
    assert body["created_at"].endswith("Z")
    assert [particle["index"] for particle in body["particles"]] == [0, 1]
    assert client.get(response.headers["location"]).json() == body
    assert post(client).json()["queue_position"] == 2


def test_what_is_left_out_comes_from_the_preset(client: TestClient) -> None:
    body = client.post(URL, json={"prompt": "a chair"}).json()
    assert (body["n"], body["preset"], body["steps"], body["progress"]["num_steps"]) == (4, "exhibit", None, 500)


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"prompt": ""}, "prompt", ""),
        ({"prompt": "  "}, "prompt", ""),
        ({"prompt": "a\x00b"}, "prompt", ""),
        ({"prompt": "a" * 1001}, "prompt", "1000"),
        ({"prompt": "a xyzzy"}, "prompt", "objects there: "),
        ({"prompt": 3}, "prompt", ""),
        ({"n": 0}, "n", ""),
        ({"n": 9}, "n", "must be at most 8 here"),
        ({"n": "2"}, "n", ""),
        ({"n": 2.5}, "n", ""),
        ({"preset": "sd21"}, "preset", "must be one of exhibit"),
        ({"preset": "../x"}, "preset", ""),
        ({"method": "magic"}, "method", "vsd"),
        ({"seed": -1}, "seed", ""),
        ({"steps": 0}, "steps", ""),
        ({"steps": 25_001}, "steps", "must be at most 25000 here"),
        ({"out": "/etc/passwd"}, "out", ""),
        ({"preset": "embedded", "prompt": "a red chair" * 20}, "prompt", "tokens too long for this prior"),
    ],
)
def test_what_cannot_be_is_refused_by_its_field(client: TestClient, records: Records, changes, field, words) -> None:
    assert_problem(post(client, **changes), 422, field, words)
    assert records.counts() == {}


def test_broken_bodies_are_refused(client: TestClient) -> None:
    json_type = {"content-type": "application/json"}
    assert_problem(client.post(URL, content=b"{", headers=json_type), 422, None, "not valid JSON")
    assert_problem(client.post(URL, content=b'"\xff"', headers=json_type), 400, None)
    assert_problem(client.post(URL, content=b"[" * 5000, headers=json_type), 400, None)
    assert_problem(client.post(URL, content=b'{"prompt": "\\ud800"}', headers=json_type), 422, "prompt")
    assert_problem(client.post(URL, content=json.dumps(CHAIR), headers={"content-type": "text/plain"}), 422, None)
    assert_problem(client.post(URL), 422, None)


def test_large_bodies_are_refused_with_and_without_their_length(client: TestClient) -> None:
    assert_problem(post(client, prompt="a" * MAX_BODY_BYTES), 413, None, str(MAX_BODY_BYTES))

    def parts() -> Iterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(20):
            yield b"a" * 1024
        yield b'"}'

    response = client.post(URL, content=parts(), headers={"content-type": "application/json"})
    assert_problem(response, 413, None, str(MAX_BODY_BYTES))


def test_an_idempotency_key_means_one_generation(client: TestClient, records: Records) -> None:
    first, again = (post(client, {"Idempotency-Key": "k-1"}) for _ in range(2))
    assert (again.status_code, again.json()["id"]) == (202, first.json()["id"])
    assert records.counts() == {"queued": 1}
    assert_problem(post(client, {"Idempotency-Key": "k-1"}, seed=9), 409, "Idempotency-Key", first.json()["id"])
    assert_problem(post(client, {"Idempotency-Key": "k" * 201}), 422, "idempotency-key")


def test_the_quota_is_told_with_a_time_to_come_back(tmp_path: Path) -> None:
    with client_of(small_settings(tmp_path, unfinished_per_key=1)) as client:
        post(client)
        refused = post(client)
        assert_problem(refused, 429, None, "1 of yours")
        assert int(refused.headers["retry-after"]) > 0


# --- looking and cancelling -----------------------------------------------------------------------------------------


def test_pages_lead_through_everything(client: TestClient) -> None:
    made = [post(client, seed=seed).json()["id"] for seed in range(5)]
    found, cursor = [], None
    while True:
        page = client.get(URL, params={"limit": 2} | ({"cursor": cursor} if cursor else {})).json()
        found += [item["id"] for item in page["items"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert found == made[::-1]


@pytest.mark.parametrize("cursor", ["x", "====", "bmFuIHg=", "MTIz", "ä"])
def test_foreign_cursors_do_no_harm(client: TestClient, cursor: str) -> None:
    post(client)
    response = client.get(URL, params={"cursor": cursor})
    assert response.status_code in (200, 422)
    if response.status_code == 422:
        assert_problem(response, 422, "cursor")


@pytest.mark.parametrize("limit", ["0", "101", "x"])
def test_limits_of_pages(client: TestClient, limit: str) -> None:
    assert_problem(client.get(URL, params={"limit": limit}), 422, "limit")


def test_what_has_not_ended_is_cancelled_and_what_has_is_deleted(
    client: TestClient, records: Records, settings: Settings
) -> None:
    path = post(client, {"Idempotency-Key": "k"}).headers["location"]
    response = client.delete(path)
    assert (response.status_code, response.json()["state"]) == (202, "cancelled")
    assert client.get(path).json()["state"] == "cancelled"
    done = f"{URL}/{finished(client, records, settings)}"
    for ended in (path, done):
        deleted = client.delete(ended)
        assert (deleted.status_code, deleted.content) == (204, b"")
        for url in (ended, f"{ended}/metrics", f"{ended}/archive.zip", f"{ended}/particles/0/{MESH}"):
            assert_problem(client.get(url), 404, None)
        assert_problem(client.delete(ended), 404, None)
        assert_problem(client.post(f"{ended}/retry"), 404, None)
    assert client.get(URL).json() == {"items": [], "next_cursor": None}
    assert records.counts() == {}
    assert post(client, {"Idempotency-Key": "k"}).headers["location"] != path, "its key is free again"


def test_who_only_cancels_never_deletes(client: TestClient, records: Records, settings: Settings) -> None:
    path, done = post(client).headers["location"], f"{URL}/{finished(client, records, settings)}"
    for _ in range(2):
        response = client.post(f"{path}/cancel")
        assert (response.status_code, response.json()["state"]) == (202, "cancelled")
    assert client.post(f"{done}/cancel").json()["state"] == "finished"


def test_deleting_is_no_way_around_the_daily_quota(tmp_path: Path) -> None:
    with client_of(small_settings(tmp_path, daily_per_key=1)) as client:
        path = post(client).headers["location"]
        assert [client.delete(path).status_code for _ in range(2)] == [202, 204]
        assert_problem(post(client), 429, None, "within 24 hours")


def test_what_failed_or_was_cancelled_can_be_tried_again(
    client: TestClient, records: Records, settings: Settings
) -> None:
    path = post(client).headers["location"]
    assert_problem(client.post(f"{path}/retry"), 409, None, "it is queued")
    client.delete(path)
    again = client.post(f"{path}/retry")
    assert (again.status_code, again.json()["state"], again.json()["ended_at"]) == (202, "queued", None)
    assert again.headers["location"] == path
    assert client.get(path).json()["queue_position"] == 1
    done = finished(client, records, settings)
    assert_problem(client.post(f"{URL}/{done}/retry"), 409, None, "it is finished")


def test_trying_again_keeps_to_the_quota(tmp_path: Path) -> None:
    with client_of(small_settings(tmp_path, unfinished_per_key=1)) as client:
        path = post(client).headers["location"]
        client.delete(path)
        post(client)
        assert_problem(client.post(f"{path}/retry"), 429, None, "1 of yours")


def test_what_is_not_there_is_a_problem(client: TestClient) -> None:
    assert_problem(client.get(f"{URL}/{'0' * 32}"), 404, None)
    assert_problem(client.delete(f"{URL}/{'0' * 32}"), 404, None)
    assert_problem(client.get(f"{URL}/..%2f..%2fetc"), 404, None)
    assert_problem(client.get(f"{URL}/{'x' * 32}"), 422, "id")
    assert_problem(client.get("/nothing"), 404, None)
    assert_problem(client.put(URL), 405, None)
    path = post(client).headers["location"]
    for name in ("particles/0/preview.png", "particles/0/mesh.glb", "archive.zip", "report.html"):
        assert_problem(client.get(f"{path}/{name}"), 404, None)
    assert client.get(f"{path}/metrics").json() == {"rows": []}


def test_a_status_is_not_sent_again_to_who_has_it(client: TestClient) -> None:
    path = post(client).headers["location"]
    tag = client.get(path).headers["etag"]
    again = client.get(path, headers={"If-None-Match": tag})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    client.delete(path)
    changed = client.get(path, headers={"If-None-Match": tag})
    assert (changed.status_code, changed.json()["state"]) == (200, "cancelled")


@pytest.mark.slow
def test_events_tell_what_changes_until_the_end(client: TestClient, records: Records) -> None:
    generation = post(client).json()["id"]
    record = records.get(generation)
    assert record is not None

    def work() -> None:
        attempt = records.take_up(record, epoch_of(records)) or 0
        wait.wait(0.9)
        records.progress(generation, attempt, {"step": 3, "losses": {"rgb": 1.5}})
        wait.wait(0.9)
        records.end(generation, attempt, "finished", {"step": 6})

    wait, worker = threading.Event(), threading.Thread(target=work)
    with client.stream("GET", f"{URL}/{generation}/events", headers={"Last-Event-ID": "41"}) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        worker.start()
        text = "".join(stream.iter_text())
    worker.join()
    told = [dict(line.split(": ", 1) for line in event.splitlines()) for event in text.strip().split("\n\n")[1:]]
    assert {event["event"] for event in told} == {"generation"}
    assert [int(event["id"]) for event in told] == list(range(42, 42 + len(told)))
    steps = [json.loads(event["data"])["progress"]["step"] for event in told]
    assert steps == sorted(steps)
    assert steps[-1] == 6
    assert json.loads(told[-1]["data"])["state"] == "finished"


def test_events_of_what_has_ended_are_one(client: TestClient) -> None:
    path = post(client).headers["location"]
    client.delete(path)
    assert client.get(f"{path}/events").text.count("event: generation") == 1


# --- the rest -------------------------------------------------------------------------------------------------------


def test_priors_name_what_they_know(client: TestClient) -> None:
    body = client.get("/v1/priors").json()
    assert [item["name"] for item in body["items"]] == ["exhibit", "embedded"]
    assert [item["default"] for item in body["items"]] == [True, False]
    assert all("chair" in item["words"] for item in body["items"])
    assert [method["name"] for method in body["methods"]] == list(METHOD_NAMES)
    assert body["limits"] == {"n": 8, "steps": 25_000, "prompt_characters": 1000}
    assert client.get("/v1/presets").json() == body


def test_health_and_readiness_are_two_things(client: TestClient) -> None:
    assert client.get("/healthz").json()["status"] == "ok"
    assert client.get("/readyz").status_code == 503, "nothing runs what this client's service accepts"


@pytest.mark.slow
def test_what_would_not_be_run_is_not_accepted(settings: Settings) -> None:
    """Ray is gone, the record is another service's: not ready within seconds, alive, and what is there can be read."""
    health, gone = SupervisorHealth(0.0), ""
    with TestClient(build_api(settings, lambda: health, lambda: gone), "http://localhost", client=LOCAL) as client:
        _wait_for(client, 200, "")
        path = post(client).headers["location"]
        client.delete(path)
        for health, gone, words in (  # noqa: B007  # the closures above look at them
            (SupervisorHealth(0.0), "Ray has ended on this machine", "Ray has ended"),
            (SupervisorHealth(0.0, refused="the record belongs to B"), "", "belongs to B"),
            (SupervisorHealth(100.0), "", "the supervisor is silent"),
        ):
            _wait_for(client, 503, words)
            refused = post(client)
            assert_problem(refused, 503, None, words)
            assert int(refused.headers["retry-after"]) > 0
            assert_problem(client.post(f"{path}/retry"), 503, None, words)
            assert client.get("/healthz").status_code == 200
            assert client.get(path).status_code == 200
        health, gone = SupervisorHealth(0.0, paused="waiting for room on the service's disk"), ""
        _wait_for(client, 200, "waiting for room")
        assert post(client).json()["progress"]["phase"] == "waiting for room on the service's disk"


def _wait_for(client: TestClient, status: int, words: str) -> None:
    deadline = time.monotonic() + 60
    while (now := client.get("/readyz")).status_code != status or words not in now.json()["detail"]:
        assert time.monotonic() < deadline, now.text
        time.sleep(0.05)


def test_a_database_that_is_away_is_a_problem_and_not_ready(client: TestClient, monkeypatch: Any) -> None:
    def away(*_args: object) -> None:
        raise RecordsAway("SELECT", {}, ConnectionError("the server closed the connection"))

    path = post(client).headers["location"]
    for name in ("add", "counts", "newest"):
        monkeypatch.setattr(Records, name, away)
    assert_problem(post(client), 503, None, "database")
    assert_problem(client.get(URL), 503, None, "database")
    assert client.get("/readyz").json() == {"status": "unavailable", "detail": "the database does not answer"}
    assert client.get(path).status_code == 200


def test_prometheus_can_read_the_figures(client: TestClient) -> None:
    post(client)
    client.get("/v1/priors")
    client.request("STRANGE", "/somewhere/else")
    text = client.get("/metrics").text
    assert 'raydream_generations{state="queued"} 1.0' in text
    assert 'route="/v1/priors",status="200"' in text
    assert "STRANGE" not in text
    assert "somewhere" not in text


def test_the_page_may_load_nothing_from_elsewhere(client: TestClient) -> None:
    assert "unsafe" not in PAGE_POLICY
    assert "http" not in PAGE_POLICY
    response = client.get("/")
    if response.status_code == 200:
        assert response.headers["content-security-policy"] == PAGE_POLICY
    else:
        assert_problem(response, 404, None)
    assert_problem(client.get("/static/../api.py"), 404, None)
    assert_problem(client.get("/static/%2e%2e/api.py"), 404, None)
