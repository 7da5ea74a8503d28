"""Keys and settings: what is stored cannot be used, and what cannot be is refused by its name."""

import json
import stat
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from service_cases import URL, assert_problem, client_of, post

from raydream.store.run_folder import MESH
from serve.api import build_api
from serve.keys import Keys, KeysAway, main
from serve.settings import Settings, is_loopback


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path / "service" / "keys.json")


def test_a_key_opens_one_name_only(keys: Keys) -> None:
    assert not keys.are_needed
    ada, bob = keys.add("ada"), keys.add("bob")
    assert keys.are_needed
    assert (keys.owner_of(ada), keys.owner_of(bob)) == ("ada", "bob")
    for wrong in ("", "ada", ada + "x", ada[:-1], ada.upper(), "\ud800"):
        assert keys.owner_of(wrong) is None


def test_the_file_holds_no_key_and_is_for_its_owner_only(keys: Keys, tmp_path: Path) -> None:
    key = keys.add("ada")
    file = tmp_path / "service" / "keys.json"
    text = file.read_text()
    assert key not in text
    assert key.removeprefix("rd_") not in text
    assert keys.owner_of(json.loads(text)["ada"]) is None
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_another_process_learns_of_changes(keys: Keys, tmp_path: Path) -> None:
    other = Keys(tmp_path / "service" / "keys.json")
    key = keys.add("ada")
    assert other.owner_of(key) == "ada"
    keys.remove("ada")
    assert other.owner_of(key) is None
    assert other.are_needed, "a service whose last key was removed must not open for everybody"


def test_a_file_that_vanishes_lets_nobody_in(keys: Keys, tmp_path: Path) -> None:
    file = tmp_path / "service" / "keys.json"
    key, seen = keys.add("ada"), Keys(file)
    assert seen.are_needed
    text = file.read_text()
    file.unlink()
    for each in (seen, keys, Keys(file, is_closed=True)):
        assert each.are_needed
        with pytest.raises(KeysAway, match="is gone"):
            each.owner_of(key)
    file.write_text("{")
    with pytest.raises(KeysAway, match="cannot be read"):
        seen.owner_of(key)
    file.write_text(text)
    assert seen.owner_of(key) == "ada"


@pytest.mark.parametrize("name", ["", "a b", "ä", "x" * 65, "../x"])
def test_bad_names_are_refused(keys: Keys, name: str) -> None:
    with pytest.raises(ValueError, match=r"^name: must be"):
        keys.add(name)


def test_a_name_has_one_key(keys: Keys) -> None:
    keys.add("ada")
    with pytest.raises(ValueError, match=r"^name: 'ada' has a key already"):
        keys.add("ada")
    with pytest.raises(ValueError, match=r"^name: nobody is called 'bob'"):
        keys.remove("bob")


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RAYDREAM_SERVE_DATA", str(tmp_path))
    assert main(["add", "ada"]) == 0
    key = capsys.readouterr().out.strip()
    assert Keys(tmp_path / "keys.json").owner_of(key) == "ada"
    assert (main(["list"]), capsys.readouterr().out) == (0, "ada\n")
    assert main(["add", "ada"]) == 2
    assert "has a key already" in capsys.readouterr().err
    assert main(["remove", "ada"]) == 0


# --- settings -------------------------------------------------------------------------------------------------------


def test_settings_come_from_the_environment(tmp_path: Path) -> None:
    environment = {
        "RAYDREAM_SERVE_DATA": str(tmp_path),
        "RAYDREAM_SERVE_MAX_N": "3",
        "RAYDREAM_SERVE_KEEP_CHECKPOINTS": "true",
        "RAYDREAM_SERVE_WARM_PARTICLES": "2",
        "RAYDREAM_SERVE_PRESETS": "exhibit,sd21",
        "RAYDREAM_SERVE_OVERRIDES": '["prior.exhibit.num_modes=2"]',
        "RAYDREAM_ASSETS": "not ours",
    }
    settings = Settings.from_environment(environment)
    assert (settings.max_n, settings.presets, settings.keep_checkpoints) == (3, ("exhibit", "sd21"), True)
    assert settings.base_config("exhibit", 7).prior.exhibit.num_modes == 2
    assert settings.base_config("exhibit", 7).stages[0].num_steps == 7
    assert settings.database_url == f"sqlite:///{tmp_path}/records.sqlite3"
    assert settings.run_uri("x") == f"{tmp_path}/runs/x"


def test_run_folders_may_lie_elsewhere(tmp_path: Path) -> None:
    settings = Settings.from_environment({"RAYDREAM_SERVE_RUNS": "s3://bucket/runs"})
    assert settings.run_uri("x") == "s3://bucket/runs/x"
    assert Path(settings.data).is_absolute()


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("MAX_N", "0", "^RAYDREAM_SERVE_MAX_N: must be at least 1"),
        ("MAX_N", "many", "^RAYDREAM_SERVE_MAX_N: must be a whole number, got 'many'"),
        ("MAXN", "1", "^RAYDREAM_SERVE_MAXN: no such setting; known are .*RAYDREAM_SERVE_MAX_N"),
        ("WARM_PARTICLES", "99", "^RAYDREAM_SERVE_WARM_PARTICLES: must be 0..max_n=8"),
        ("PORT", "70000", "^RAYDREAM_SERVE_PORT: must be"),
        ("PRESETS", "exhibit,nope", "^RAYDREAM_SERVE_PRESETS: unknown 'nope'"),
        ("PRESETS", "", "^RAYDREAM_SERVE_PRESETS: must name at least one"),
        ("KEEP_CHECKPOINTS", "maybe", "^RAYDREAM_SERVE_KEEP_CHECKPOINTS: must be true or false, got 'maybe'"),
        ("KEEP_DAYS", "-1", "^RAYDREAM_SERVE_KEEP_DAYS: must be at least 0"),
        ("OVERRIDES", "[1]", "^RAYDREAM_SERVE_OVERRIDES: must be a JSON list of texts"),
        ("OVERRIDES", "prior.exhibit.num_mode=2", "^prior.exhibit.num_mode: unknown field"),
    ],
)
def test_what_cannot_be_is_refused_by_its_name(name: str, value: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        Settings.from_environment({f"RAYDREAM_SERVE_{name}": value})


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True), ("localhost", True), ("::1", True), ("[::1]", True), ("127.8.8.8", True),
        ("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("localhost.evil.example", False), ("", False),
    ],
)  # fmt: skip
def test_what_is_this_machine_itself(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


# --- who may ask ----------------------------------------------------------------------------------------------------


def test_with_keys_everybody_sees_his_own(settings: Settings) -> None:
    keys = Keys(settings.keys_file)
    ada, bob = ({"Authorization": f"Bearer {keys.add(name)}"} for name in ("ada", "bob"))
    with client_of(settings, host="10.1.2.3", name="http://raydream.example") as client:
        for headers in (None, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic eDp5"}):
            refused = post(client, headers)
            assert_problem(refused, 401, None)
            assert refused.headers["www-authenticate"] == "Bearer"
        path = post(client, ada).headers["location"]
        assert client.get(path, headers=ada).status_code == 200
        for url in (path, f"{path}/events", f"{path}/metrics", f"{path}/archive.zip", f"{path}/particles/0/{MESH}"):
            assert_problem(client.get(url, headers=bob), 404, None)
            assert_problem(client.get(url), 401, None)
        assert_problem(client.delete(path, headers=bob), 404, None)
        assert client.get(path, headers=ada).json()["state"] == "queued"
        assert client.get(URL, headers=bob).json()["items"] == []
        for url in ("/v1/priors", "/metrics"):
            assert_problem(client.get(url), 401, None)
            assert client.get(url, headers=bob).status_code == 200
        assert client.get("/healthz").status_code == 200


def test_without_keys_only_this_machine_may_ask(settings: Settings) -> None:
    with client_of(settings, host="10.1.2.3") as client:
        assert_problem(client.get(URL), 403, None, "serve.keys add")
    with client_of(settings, name="http://evil.example") as client:
        assert_problem(client.get(URL), 421, None)
    for name in ("http://127.0.0.1:8000", "http://[::1]:8000", "http://localhost:1"):
        with client_of(settings, name=name) as client:
            assert client.get(URL).status_code == 200


@pytest.mark.parametrize("is_closed", [False, True])
def test_keys_that_vanish_close_the_service(settings: Settings, is_closed: bool) -> None:
    """While it runs, and for a replica that comes later and is told that there were keys."""
    headers = {"Authorization": f"Bearer {Keys(settings.keys_file).add('ada')}"}
    if is_closed:
        settings.keys_file.unlink()
    with TestClient(build_api(settings, is_closed=is_closed), "http://localhost", client=("127.0.0.1", 1)) as client:
        if not is_closed:
            assert client.get(URL, headers=headers).status_code == 200
            settings.keys_file.unlink()
        for sent in (headers, {"Authorization": "Bearer wrong"}):
            assert_problem(client.get(URL, headers=sent), 503, None, "the file of API keys is gone")
            assert_problem(post(client, sent), 503, None)
        assert_problem(client.get(URL), 401, None)
        other = {"Authorization": f"Bearer {Keys(settings.keys_file).add('ada')}"}
        assert client.get(URL, headers=other).status_code == 200


def test_another_sites_page_cannot_post(settings: Settings) -> None:
    preflight = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    with client_of(settings) as client:
        response = client.options(URL, headers=preflight)
    assert response.status_code == 405
    assert not any(name.startswith("access-control") for name in response.headers)
