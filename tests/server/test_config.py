from __future__ import annotations

import pickle
import traceback

import pytest

from server.access.tokens import read_token
from server.config import ConfigError, ServerConfig
from server.config_sources import load_config, shadowing_links

FILE = """
model_store = "models"
model = "tiny"
feature_store = "memory://"
grpc_port = 6000
[surfaces.home]
deadline_ms = 25
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "pinrank.toml"
    path.write_text(FILE)
    return path


def test_file_values_and_defaults(file):
    config = load_config(file)
    assert (config.grpc_port, config.http_port) == (6000, 9095)
    assert config.model_store == str(file.parent / "models")
    assert (config.surface("home").deadline_ms, config.surface("related").deadline_ms) == (25, 100)


def test_default_ports():
    config = load_config(None, {"model_store": "m", "model": "tiny", "feature_store": "memory://"})
    assert (config.grpc_port, config.http_port) == (50051, 9095)


def test_options_go_before_variables_and_variables_before_the_file(file, monkeypatch):
    monkeypatch.setenv("PINRANK_GRPC_PORT", "8000")
    monkeypatch.setenv("PINRANK_SURFACES__HOME__DEADLINE_MS", "7")
    config = load_config(file, {"host": None})
    assert config.grpc_port == 8000
    assert config.surface("home").deadline_ms == 7
    assert load_config(file, {"grpc_port": 7000}).grpc_port == 7000


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PINRANK_GPRC_PORT", "1"),
        ("PINRANK_GRPC_PORT__X", "1"),
        ("pinrank_gprc_port", "1"),
        ("PINRANK_LABELS", "stable"),
    ],
)
def test_misspelt_or_malformed_variable_is_fatal_and_named(file, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"(?i){name.removeprefix('PINRANK_')}"):
        load_config(file)


@pytest.mark.parametrize(
    ("written", "device", "devices"),
    [("", None, (0,)), ("device = 0", (0,), (0,)), ("device = 3", (3,), (3,)), ("device = [2, 0]", (2, 0), (2, 0))],
)
def test_gpus_are_a_number_or_several_in_the_file(tmp_path, written, device, devices):
    file = tmp_path / "gpu.toml"
    file.write_text(f'engine = "torch"\n{written}\n{FILE}')
    config = load_config(file)
    assert (config.device, config.devices) == (device, devices)


@pytest.mark.parametrize(("value", "devices"), [("1", (1,)), ("[0, 1]", (0, 1))])
def test_gpus_are_a_number_or_several_in_the_environment(file, monkeypatch, value, devices):
    monkeypatch.setenv("PINRANK_ENGINE", "tensorrt")
    monkeypatch.setenv("PINRANK_DEVICE", value)
    assert load_config(file).devices == devices


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("-1", "device: .*-1: use a GPU's number from 0 to 63, or a list of such numbers"),
        ("64", "device: .*64: use a GPU's number"),
        ("0,1", "device: .*'0,1': use a GPU's number"),
        ("", "device: .*'': use a GPU's number"),
        ("true", "device: .*True: use a GPU's number"),
        ("[]", "device: .*use a GPU's number"),
        ("[0, 1.5]", "device: .*use a GPU's number"),
        ("[0, 1, 0]", r"device: .*\[0, 1, 0\] names a GPU twice"),
    ],
)
def test_what_are_no_gpus_is_fatal_and_named(file, monkeypatch, value, message):
    monkeypatch.setenv("PINRANK_ENGINE", "torch")
    monkeypatch.setenv("PINRANK_DEVICE", value)
    with pytest.raises(ConfigError, match=message):
        load_config(file)


@pytest.mark.parametrize("engine", ["openvino", "numpy"])
def test_a_gpu_for_an_engine_of_the_processor_is_fatal_and_named(file, monkeypatch, engine):
    monkeypatch.setenv("PINRANK_ENGINE", engine)
    assert load_config(file).device is None
    monkeypatch.setenv("PINRANK_DEVICE", "0")
    with pytest.raises(ConfigError, match=f"device: engine '{engine}' runs on the CPU; unset device"):
        load_config(file)


def links(service, number, protocol, address):
    """What Kubernetes sets for a Service with one port that has a name."""
    name, ports = service.upper().replace("-", "_"), f"{protocol.lower()}://{address}:{number}"
    own = f"{name}_PORT_{number}_{protocol}"
    return {
        f"{name}_SERVICE_HOST": address, f"{name}_SERVICE_PORT": str(number),
        f"{name}_SERVICE_PORT_HTTP_METRICS": str(number), f"{name}_PORT": ports, own: ports,
        f"{own}_PROTO": protocol.lower(), f"{own}_PORT": str(number), f"{own}_ADDR": address,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("service", "shadowing"),
    [
        ("pinrank", []),
        ("pinrank-canary", []),
        ("pinrank-grpc", ["PINRANK_GRPC_PORT"]),
        ("pinrank-http", ["PINRANK_HTTP_PORT"]),
    ],
)
@pytest.mark.parametrize(("protocol", "address"), [("TCP", "10.0.0.1"), ("UDP", "10.0.0.1"), ("SCTP", "fd00::1")])
def test_service_links_of_kubernetes_are_no_settings(file, monkeypatch, service, shadowing, protocol, address):
    without = load_config(file)
    for name, value in links(service, 50051, protocol, address).items():
        monkeypatch.setenv(name, value)
    found = load_config(file)
    assert found.model_dump() == without.model_dump()
    assert shadowing_links() == shadowing


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PINRANK_GRPC_PORT", "tcp://10.0.0.1"),
        ("PINRANK_GRPC_PORT", "http://10.0.0.1:50051"),
        ("PINRANK_GRPC_PORT", "tcp://example.com:50051"),
        ("PINRANK_GRPC_PORT", ""),
        ("PINRANK_HTTP_PORT", "65536"),
        ("PINRANK_CANARY_SERVICE_HOST", "canary"),
        ("PINRANK_CANARY_SERVICE_PORT", "http"),
        ("PINRANK_CANARY_PORT", "50051"),
        ("PINRANK_PORT_50051_TCP_PROTO", "udp"),
        ("PINRANK_PORT_50051_ICMP", "icmp://10.0.0.1:50051"),
        ("PINRANK_SWAP__POLL_S", "tcp://10.0.0.1:50051"),
    ],
)
def test_what_only_looks_like_a_service_link_is_fatal_and_named(file, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"(?i){name.removeprefix('PINRANK_').replace('__', '.')}"):
        load_config(file)


def test_service_links_that_look_like_a_nested_setting_are_none(file, monkeypatch):
    without = load_config(file)
    for name, value in links("pinrank-swap--poll", 1, "TCP", "10.0.0.1").items():
        monkeypatch.setenv(name, value)
    assert load_config(file).model_dump() == without.model_dump()


def test_settings_that_are_given_as_such_leave_the_environment_out(monkeypatch):
    monkeypatch.setenv("PINRANK_GRPC_PORT", "7000")
    monkeypatch.setenv("PINRANK_SWAP__NOTHING", "7000")
    assert ServerConfig(model_store="m", model="tiny", feature_store="memory://").grpc_port == 50051


def test_a_port_set_by_number_beside_service_links_is_the_port(file, monkeypatch):
    for name, value in links("pinrank-grpc", 1, "TCP", "10.0.0.1").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PINRANK_GRPC_PORT", "7000")
    assert load_config(file).grpc_port == 7000


def test_a_variable_of_the_command_is_no_setting(file, monkeypatch):
    monkeypatch.setenv("PINRANK_TOKEN_FILE", "/run/token")
    assert load_config(file).admin_token_file is None


def test_variables_that_commands_read_are_settings_or_known():
    """Whatever the command reads from the environment, a server beside it must bear."""
    import typer

    from server.cli.main import app
    from server.environment import OF_COMMANDS, PREFIX

    def read(command):
        for parameter in command.params:
            yield from [parameter.envvar] if isinstance(parameter.envvar, str) else parameter.envvar or ()
        for one in getattr(command, "commands", {}).values():
            yield from read(one)

    found = set(read(typer.main.get_command(app)))
    assert found > OF_COMMANDS
    assert {name.removeprefix(PREFIX).lower() for name in found - OF_COMMANDS} <= set(ServerConfig.model_fields)


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "::", "[::]", "::1", "fe80::1%eth0", "0.0.0.0", "localhost", "ranker-1.svc", "unix:/run/p.sock"],
)
def test_hosts(file, host):
    assert load_config(file, {"host": host}).host == host


@pytest.mark.parametrize(
    ("content", "value"),
    [
        pytest.param('admin_token_file = "a"', lambda found: found.admin_token_file, id="admin_token_file"),
        pytest.param('callers_file = "a"', lambda found: found.callers_file, id="callers_file"),
        pytest.param('utility = "a"', lambda found: found.utility, id="utility"),
        pytest.param('state_folder = "a"', lambda found: found.state_folder, id="state_folder"),
        pytest.param('[swap]\ntrusted_keys = ["a"]', lambda found: found.swap.trusted_keys[0], id="trusted_keys"),
        pytest.param(
            '[impressions]\nspool_folder = "a"', lambda found: found.impressions.spool_folder, id="spool_folder"
        ),
    ],
)
def test_files_are_relative_to_the_settings(file, content, value):
    (file.parent / "a").touch()
    file.write_text(f"{content}\n{FILE}" if content[0] != "[" else f"{FILE}\n{content}")
    assert value(load_config(file)) == file.parent / "a"
    file.write_text(file.read_text().replace('"a"', f'"{file.parent / "a"}"'))
    assert value(load_config(file)) == file.parent / "a"


def test_an_empty_state_folder_is_none_and_not_the_folder_of_the_settings(file):
    file.write_text(f'state_folder = ""\n{FILE}')
    assert load_config(file).state_folder is None


def test_certificate_files_are_relative_to_the_settings(file, monkeypatch):
    for name in ("a.crt", "a.key", "ca.crt"):
        (file.parent / name).touch()
    file.write_text(FILE + '[tls]\ncertificate = "a.crt"\nkey = "a.key"\nclient_ca = "ca.crt"\n')
    found = load_config(file).tls
    assert (found.certificate, found.key, found.client_ca) == tuple(
        file.parent / name for name in ("a.crt", "a.key", "ca.crt")
    )
    assert found.clients == "require"
    monkeypatch.setenv("PINRANK_TLS__CLIENT_CERTIFICATES", "ask")
    monkeypatch.setenv("PINRANK_TLS_CA", "of/the/commands")
    assert load_config(file).tls.clients == "ask"


@pytest.mark.parametrize(
    ("tls", "message"),
    [
        ('certificate = "a.crt"', "tls: certificate is set without key; set both, or neither"),
        ('key = "a.crt"', "tls: key is set without certificate"),
        ('client_ca = "a.crt"', "tls: client certificates need TLS: set certificate and key"),
        (
            'certificate = "a.crt"\nkey = "a.crt"\nclient_certificates = "ask"',
            'tls: client_certificates = "ask" needs client_ca: set it to the PEM file of the authorities',
        ),
        ('certificate = "b.crt"\nkey = "a.crt"', "tls.certificate: Path does not point to a file"),
        ('minimum = "1.1"', "tls.minimum: Input should be '1.2' or '1.3'"),
    ],
)
def test_tls_settings_that_contradict_each_other_are_named(file, tls, message):
    (file.parent / "a.crt").touch()
    file.write_text(f"{FILE}[tls]\n{tls}\n")
    with pytest.raises(ConfigError, match=message):
        load_config(file)


def test_a_server_with_tls_cannot_be_told_to_be_insecure(file):
    (file.parent / "a.crt").touch()
    tls = {"certificate": file.parent / "a.crt", "key": file.parent / "a.crt"}
    with pytest.raises(ConfigError, match="insecure: tls.certificate is set, and both ports use it"):
        load_config(file, {"tls": tls, "insecure": True})


@pytest.mark.parametrize("host", ["", "127.0.0.1:80", "[::1]:80", "[::1", "http://a", "unix:relative.sock", "a b"])
def test_bad_host_is_fatal_and_named(file, host):
    with pytest.raises(ConfigError, match="host: .*use an address"):
        load_config(file, {"host": host})


def test_processes_cannot_share_a_unix_socket(file):
    with pytest.raises(ConfigError, match="processes: 2 cannot share unix:/run/p.sock"):
        load_config(file, {"host": "unix:/run/p.sock", "processes": 2})


def test_utility_file_that_is_not_there_is_named(file):
    with pytest.raises(ConfigError, match="utility: Path does not point to a file"):
        load_config(file, {"utility": file.parent / "absent.toml"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('engine = "abacus"', "engine: unknown engine 'abacus'; choose one of numpy"),
        ("grpc_port = 70000", "grpc_port: Input should be less than or equal to 65535"),
        ("grpc_prot = 1", "grpc_prot: Extra inputs are not permitted"),
        ("candidates_max = 0", "candidates_max: Input should be greater"),
        ("fetch_budget_share = 2", "fetch_budget_share"),
        ("host = [", "Invalid"),
    ],
)
def test_bad_value_is_fatal_and_named(file, change, message):
    file.write_text(change + "\n" + FILE.replace("grpc_port = 6000", ""))
    with pytest.raises(ConfigError) as raised:
        load_config(file)
    assert message in str(raised.value)


def test_missing_values_are_all_named():
    with pytest.raises(ConfigError) as raised:
        load_config(None)
    assert all(name in str(raised.value) for name in ("model_store", "model", "feature_store"))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent.toml"):
        load_config(tmp_path / "absent.toml")


URL = "redis://someone:planted-password@127.0.0.1:6379/0"


def test_settings_print_no_secrets(file, monkeypatch):
    monkeypatch.setenv("PINRANK_FEATURE_STORE", URL)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-key")
    config = load_config(file)
    shown = f"{config} {config!r} {config.model_dump_json()} {config.model_dump()}"
    assert "planted" not in shown
    assert config.feature_store.get_secret_value() == URL
    assert config.secrets() == {"planted-password", "planted-key"}


def test_processes_are_given_the_settings_with_their_secrets(file):
    config = load_config(file, {"feature_store": URL})
    given = pickle.loads(pickle.dumps(config.model_dump()))
    assert ServerConfig(**given).model_dump() == config.model_dump()
    assert given["feature_store"].get_secret_value() == URL


@pytest.mark.parametrize("name", ["GRPC_PORT", "SURFACES", "FETCH_BUDGET_SHARE", "SWAP__POLL_S", "ADMIN_TOKEN_FILE"])
def test_an_unusable_value_is_named_and_not_shown(file, monkeypatch, name):
    monkeypatch.setenv(f"PINRANK_{name}", "planted-in-the-wrong-place")
    with pytest.raises(ConfigError, match=f"(?i){name.replace('__', '.')}") as raised:
        load_config(file)
    shown = "".join(traceback.format_exception(raised.value))
    assert "planted" not in shown


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"planted token", "one line of printable ASCII"),
        (b"planted\xff", "one line of printable ASCII"),
        (b"planted\nplanted", "one line of printable ASCII"),
    ],
)
def test_a_token_that_no_call_can_bring_is_refused_and_not_shown(tmp_path, content, message):
    path = tmp_path / "token"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as raised:
        read_token(path)
    assert "planted" not in str(raised.value)


def test_a_token_is_kept_as_a_digest(tmp_path):
    path = tmp_path / "token"
    path.write_text("planted-token\n")
    token = read_token(path)
    assert token.is_in("Bearer planted-token")
    assert token.is_in(b"Bearer planted-token")
    for wrong in (
        "",
        "Bearer ",
        "planted-token",
        "Bearer planted-tokens",
        "bearer planted-token",
        "Basic planted-token",
    ):
        assert not token.is_in(wrong)
    assert b"planted" not in pickle.dumps(token)
    path.write_text("\n")
    assert read_token(path) is None


def test_a_log_that_could_lose_more_than_a_second_of_rows_is_refused_with_the_reason(file, monkeypatch):
    monkeypatch.setenv("PINRANK_IMPRESSIONS__FLUSH_S", "60")
    told = r"impressions.flush_s: .*60: at most 1, because a server that is killed loses the rows of one interval"
    with pytest.raises(ConfigError, match=f"(?i){told}"):
        load_config(file)
    monkeypatch.setenv("PINRANK_IMPRESSIONS__FLUSH_S", "1")
    assert load_config(file).impressions.flush_s == 1
