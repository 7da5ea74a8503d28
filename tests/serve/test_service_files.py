"""Files of a generation over HTTP: types, ranges, archives, other storage, pictures that change."""

import asyncio
import io
import zipfile
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import pytest
from fastapi import Request
from fastapi.testclient import TestClient
from pyarrow import fs
from service_cases import CONTENT, URL, assert_problem, finished

from raydream.store.run_folder import MESH, METRICS, PREVIEW, REPORT, TURNTABLE, particle_file, preview_file
from raydream.store.storage import RemoteFiles
from serve.artefacts import send_file
from serve.records import Records
from serve.settings import Settings


@pytest.fixture
def done(client: TestClient, records: Records, settings: Settings) -> str:
    return f"{URL}/{finished(client, records, settings)}"


def test_files_have_their_types(client: TestClient, done: str) -> None:
    types = {PREVIEW: "image/png", TURNTABLE: "video/mp4", MESH: "model/gltf-binary"}
    body = client.get(done).json()
    for name, kind in types.items():
        response = client.get(f"{done}/particles/0/{name}")
        assert (response.status_code, response.content) == (200, CONTENT[name] + b"\0")
        assert response.headers["content-type"] == kind
        assert response.headers["x-content-type-options"] == "nosniff"
        assert body["particles"][0][name.split(".")[0]] == f"{done}/particles/0/{name}"
    assert body["particles"][1]["mesh"] is None
    assert client.get(f"{done}/particles/1/{MESH}").status_code == 404
    assert_problem(client.get(f"{done}/particles/-1/{MESH}"), 422, "index")


def test_files_answer_ranges_and_tags(client: TestClient, done: str) -> None:
    url = f"{done}/particles/0/{TURNTABLE}"
    whole = client.get(url)
    part = client.get(url, headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, bytes(range(10, 20)))
    assert part.headers["content-range"] == "bytes 10-19/257"
    assert client.get(url, headers={"Range": "bytes=9999-"}).status_code == 416
    tag = whole.headers["etag"]
    assert client.get(url, headers={"If-None-Match": tag}).status_code == 304
    assert client.get(url, headers={"If-None-Match": f'W/{tag}, "x"'}).status_code == 304
    assert client.get(url, headers={"If-None-Match": '"x"'}).status_code == 200
    resumed = client.get(url, headers={"Range": "bytes=10-", "If-Range": '"other"'})
    assert (resumed.status_code, resumed.content) == (200, whole.content)


def test_the_archive_holds_the_run_without_its_checkpoints(client: TestClient, done: str) -> None:
    response = client.get(f"{done}/archive.zip")
    assert response.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
        assert archive.testzip() is None
        names = set(archive.namelist())
        assert archive.read(f"raydream/{particle_file(0, MESH)}") == CONTENT[MESH] + b"\0"
    assert {f"raydream/{name}" for name in ("config.json", METRICS, REPORT, preview_file(3))} <= names
    assert not any("checkpoint" in name for name in names)
    tag = response.headers["etag"]
    assert client.get(f"{done}/archive.zip", headers={"If-None-Match": tag}).status_code == 304


def test_run_folders_on_other_storage_go_through_the_cache(
    client: TestClient, records: Records, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    generation = finished(client, records, settings)
    storage = fs.LocalFileSystem()
    monkeypatch.setattr(
        "raydream.store.run_folder.resolve", lambda uri, _filesystem, _patience_s: RemoteFiles(storage, uri)
    )
    for _ in range(2):
        assert client.get(f"{URL}/{generation}/particles/0/{MESH}").content == CONTENT[MESH] + b"\0"
    assert (settings.cache / generation / particle_file(0, MESH)).is_file()


def test_a_report_has_no_origin(client: TestClient, done: str) -> None:
    response = client.get(f"{done}/report.html")
    assert response.headers["content-type"].startswith("text/html")
    policy = response.headers["content-security-policy"]
    assert policy.startswith("sandbox allow-scripts;")
    assert "allow-same-origin" not in policy


def test_metrics_are_losses_by_step_thinned_out(client: TestClient, records: Records, settings: Settings) -> None:
    generation = finished(client, records, settings, num_rows=2000)
    rows = client.get(f"{URL}/{generation}/metrics").json()["rows"]
    assert len(rows) == 500
    assert (rows[0], rows[-1]) == ({"step": 0, "rgb": 0.0}, {"step": 1999, "rgb": 999.5})
    rest = client.get(f"{URL}/{generation}/metrics", params={"after": 1990}).json()["rows"]
    assert [row["step"] for row in rest] == list(range(1991, 2000))


def test_a_picture_that_is_replaced_while_it_is_sent_is_whole(tmp_path: Path) -> None:
    """A run that goes on puts a new preview in the place of the old one, of another length."""
    path = tmp_path / "preview.png"
    path.write_bytes(bytes(500))
    response = send_file(Request({"type": "http", "headers": []}), path, None)
    path.write_bytes(bytes(90))
    sent: list[MutableMapping[str, Any]] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    async def receive() -> MutableMapping[str, Any]:
        await asyncio.sleep(60)  # nobody hangs up
        return {"type": "http.disconnect"}

    asyncio.run(response({"type": "http", "method": "GET", "headers": []}, receive, send))
    assert dict(sent[0]["headers"])[b"content-length"] == b"500"
    assert b"".join(part["body"] for part in sent[1:]) == bytes(500)
