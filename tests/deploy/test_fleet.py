"""Folders of a fleet, its command lines and its app, by what their readers make of them: modes, TOML, a syntax tree."""

from __future__ import annotations

import ast
import re
import socket
import stat
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from fedsparse.deploy import app, fleet, joining, processes, superlink
from fedsparse.deploy.__main__ import parser, run
from fedsparse.deploy.fleet import Fleet, Node
from fedsparse.deploy.place import Place


@pytest.fixture
def made(tmp_path):
    """A fleet without certificates, whose library is where Flower is."""
    return fleet.init(tmp_path / "fleet", "127.0.0.1", 9092, 2, 30, True)


def test_init_writes_folders_that_only_their_owner_reads(made):
    paths = list(made.folder.rglob("*"))
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths if path.is_file()} == {0o600}
    assert {stat.S_IMODE(path.stat().st_mode) for path in [made.folder, *paths] if path.is_dir()} == {0o700}
    assert (made.folder / ".gitignore").read_text() == (made.folder / "node-1" / ".gitignore").read_text() == "*\n"
    assert Fleet.read(made.folder) == made
    assert Node.read(made.folder / "node-1") == Node(made.folder / "node-1", "127.0.0.1", 9092, 1, True)


def test_a_node_s_folder_is_read_wherever_it_is_copied(made, tmp_path):
    moved = (made.folder / "node-0").rename(tmp_path / "elsewhere")
    assert Node.read(moved).folder == moved


def test_init_overwrites_nothing(made):
    before = {path: path.stat().st_mtime_ns for path in made.folder.rglob("*")}
    with pytest.raises(ValueError, match="is not empty, and nothing in it is overwritten"):
        fleet.init(made.folder, "127.0.0.1", 9092, 2, 30, True)
    assert before == {path: path.stat().st_mtime_ns for path in made.folder.rglob("*")}


@pytest.mark.parametrize(
    ("host", "port", "nodes", "insecure", "said"),
    [
        ("a.example", 9092, 1, True, "--insecure needs --host 127.0.0.1, not a.example"),
        ("a/b", 9092, 1, False, "host is 'a/b', which is neither a name of a machine nor an address"),
        ("", 9092, 1, False, "host is ''"),
        ("-x", 9092, 1, False, "host is '-x'"),
        ("127.0.0.1", 0, 1, True, "port is 0"),
        ("127.0.0.1", 65_536, 1, True, "port is 65536, above 65535"),
        ("127.0.0.1", 9092, 0, True, "nodes is 0"),
        ("127.0.0.1", 9092, 10_001, True, "nodes is 10001, above 10000"),
    ],
)
def test_what_no_fleet_can_be_is_refused_and_leaves_nothing(tmp_path, host, port, nodes, insecure, said):
    with pytest.raises(ValueError, match=said):
        fleet.init(tmp_path / "fleet", host, port, nodes, 30, insecure)
    assert not (tmp_path / "fleet").exists()


@pytest.mark.parametrize("text", ["", "[]", "host: a", "host: a\nport: '1'\nnodes: 1\ninsecure: true\n", "a: 1"])
def test_a_file_that_is_not_a_fleet_s_is_refused(made, text):
    (made.folder / "fleet.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"fleet.yaml does not hold host \(str\), port \(int\), nodes \(int\), insec"):
        Fleet.read(made.folder)


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is not the folder of a fleet: it has no fleet\.yaml"):
        Fleet.read(tmp_path)
    with pytest.raises(ValueError, match=r"is not the folder of a node: it has no node\.yaml"):
        Node.read(tmp_path)


@pytest.mark.parametrize(
    ("host", "own"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True)]
    + [("10.0.0.1", False), ("::", False), ("server.example", False), ("localhost.example", False)],
)
def test_loopback(host, own):
    assert fleet.loopback(host) is own


def test_the_superlink_listens_beyond_this_machine_only_if_the_fleet_is_beyond_it(tmp_path):
    listens = {
        host: superlink.bound(Fleet(tmp_path, host, 1, 1, False)) for host in ("127.0.0.1", "a.example", "2001:db8::1")
    }
    assert listens == {"127.0.0.1": "127.0.0.1", "a.example": "0.0.0.0", "2001:db8::1": "::"}


def test_a_superlink_with_tls_asks_for_the_nodes_keys(tmp_path):
    typed = list(superlink.command(Fleet(tmp_path / "fleet", "a.example", 9092, 1, False)))
    flags = dict(zip(typed[1:], typed[2:], strict=False))
    assert flags["--ssl-ca-certfile"] == str(tmp_path / "fleet/authority/certificate.pem")
    assert flags["--ssl-certfile"] == str(tmp_path / "fleet/server/certificate.pem")
    assert flags["--ssl-keyfile"] == str(tmp_path / "fleet/server/key")
    assert (flags["--host"], flags["--port"]) == ("0.0.0.0", "9092")
    assert flags["--database"] == str(tmp_path / "fleet/flower/state.db")
    assert {"--enable-supernode-auth", "--disable-runtime-dependency-installation"} <= set(typed)
    assert "--insecure" not in typed
    insecure = superlink.command(Fleet(tmp_path, "127.0.0.1", 9092, 1, True))
    assert "--insecure" in insecure
    assert not any("ssl" in part or "auth" in part for part in insecure)


@pytest.mark.parametrize("insecure", [False, True])
def test_flower_s_command_line_finds_the_superlink(made, insecure):
    found = Fleet(made.folder, "127.0.0.1", 9092, 2, insecure)
    superlink.connect(found)
    written = tomllib.loads((made.folder / "flower" / "config.toml").read_text())["superlink"]
    trust = {"insecure": True} if insecure else {"root-certificates": str(found.authority.resolve())}
    assert written == {"default": "fleet", "fleet": {"address": "127.0.0.1:9092"} | trust}


def test_a_port_that_is_taken_is_refused(made):
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = Fleet(made.folder, "127.0.0.1", other.getsockname()[1], 2, True)
        with pytest.raises(ValueError, match=r"port \d+: Address already in use$"):
            superlink.check_port(taken)
    superlink.check_port(taken)


CONFIG = 'a: "quotes"\nb: \'\\ \t é 𝛿 \x7f # no comment\n"""'


def test_the_app_holds_the_configuration_and_what_flower_asks_for(tmp_path):
    app.write(tmp_path / "app", CONFIG, tmp_path / 'run\'s "folder"', True)
    project = tomllib.loads((tmp_path / "app" / "pyproject.toml").read_text(encoding="utf-8"))
    found = project["tool"]["flwr"]["app"]
    assert found["config"] == {"config": CONFIG, "folder": str(tmp_path / 'run\'s "folder"'), "resume": True}
    assert project["project"]["dependencies"] == ["flwr==1.42.*"]
    assert (tmp_path / "app" / project["project"]["license"]["file"]).is_file()
    for component, reference in found["components"].items():
        module, name = reference.split(":")
        tree = ast.parse((tmp_path / "app" / Path(*module.split("."))).with_suffix(".py").read_text())
        (assigned,) = (node for node in tree.body if isinstance(node, ast.Assign))
        assert (component, ast.unparse(assigned.targets[0])) == (f"{name}app", name)
    assert all(len(path.read_text()) < 100 for path in (tmp_path / "app").rglob("*.py"))


def test_a_node_s_settings_survive_flower_s_command_line(tmp_path):
    """Which splits at spaces, and reads values as TOML does."""
    place = Place(tmp_path / "with space", 3, ("data.root=/srv/a b", "note='\"x\" = y'", "é=%20"))
    written = place.for_flower()
    assert Place.of_flower(tomllib.loads(written.replace(" ", "\n"))) == place
    typed = joining.for_supernode(Node(tmp_path, "a.example", 9092, 3, False), place, 5000)
    assert typed[-1] == written
    assert typed[typed.index("--superlink") + 1] == "a.example:9092"
    assert typed[typed.index("--root-certificates") + 1] == str(tmp_path / "certificate.pem")
    assert typed[typed.index("--auth-supernode-private-key") + 1] == str(tmp_path / "key")


def test_a_server_that_is_not_there_is_one_line(made):
    node = Node(made.folder / "node-0", "127.0.0.1", joining.free_port(), 0, True)
    with pytest.raises(ValueError, match=r"^no server at 127\.0\.0\.1:\d+: Connection refused$"):
        joining.check(node)


def test_a_node_without_tls_joins_this_machine_alone_and_one_with_it_needs_its_files(made):
    with pytest.raises(ValueError, match=r"without TLS nodes and server are one machine, and the server is a\.example"):
        joining.check(Node(made.folder / "node-0", "a.example", 1, 0, True))
    with pytest.raises(ValueError, match=r"certificate\.pem is not there: copy the whole folder of the node"):
        joining.check(Node(made.folder / "node-0", "127.0.0.1", 1, 0, False))


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("", "the following arguments are required: init|server|node|submit|status; python -m fedsparse.deploy --help"),
        ("init fleet", "the following arguments are required: --host, --nodes; "),
        ("init fleet --host a --nodes many", "argument --nodes: invalid int value: 'many'; "),
        ("node fleet/node-0 hello", "hello: give overrides as key=value"),
        ("submit fleet resume", "resume: give overrides as key=value"),
        ("node x --isolation other", "argument --isolation: invalid choice: 'other'"),
    ],
)
def test_wrong_arguments_are_one_line(typed, said):
    with pytest.raises(ValueError, match=f"^{re.escape(said)}[^\n]*$"):
        run(typed.split())


def test_overrides_may_stand_beside_flags():
    options = parser().parse_args(["node", "fleet/node-0", "data.root=/srv", "seed=1", "--isolation", "subprocess"])
    assert (options.folder, options.overrides, options.isolation) == (
        *(Path("fleet/node-0"), ["data.root=/srv", "seed=1"]),
        "subprocess",
    )


def missing(name):
    raise PackageNotFoundError(name)


@pytest.mark.parametrize("verb", ["server", "node", "submit", "status"])
def test_without_flower_a_command_says_how_to_install_it(tmp_path, monkeypatch, verb):
    monkeypatch.setattr(processes, "version", missing)
    with pytest.raises(ValueError, match=r"^deployment needs Flower: pip install 'fedsparse\[flower\]'"):
        run([verb, str(tmp_path)])


@pytest.mark.parametrize(("found", "right"), [("1.42.0", True), ("1.42.7", True), ("1.41.0", False), ("1.43.0", False)])
def test_another_version_of_flower_is_refused(monkeypatch, found, right):
    monkeypatch.setattr(processes, "version", lambda name: found)
    if right:
        processes.check_flower()
    else:
        with pytest.raises(ValueError, match=rf"^deployment needs flwr 1\.42, and {found} is installed"):
            processes.check_flower()


DEPLOY = Path(fleet.__file__).parent
PUBLIC = {"flwr.app", "flwr.serverapp", "flwr.clientapp"}
INSIDE = {
    "flwr.common.constant": {"ErrorCode"},
    "flwr.proto.fleet_pb2": {"DeactivateNodeRequest"},
    "flwr.proto.message_pb2": {"ConfirmMessageReceivedRequest"},
    "flwr.proto.runtime_pb2": {"PullAppMessagesRequest", "PullAppMessagesResponse"},
    "flwr.supercore.inflatable.inflatable_object": {
        *("get_all_nested_objects", "get_object_tree", "no_object_id_recompute"),
    },
    "flwr.supercore.inflatable.inflatable_protobuf_utils": {"make_pull_object_fn_protobuf"},
    "flwr.supercore.inflatable.inflatable_utils": {
        *("ObjectUnavailableError", "pull_and_inflate_object_from_tree", "push_objects"),
    },
    "flwr.supercore.interceptors.http.runtime_version": {"RuntimeVersionHttpInterceptor"},
    "flwr.supercore.run": {"RunNotRunningException"},
    "flwr.supernode.fleet_http_client": {"FleetHttpClient"},
    "flwr.supernode.node_auth_http_interceptor": {"NodeAuthHttpInterceptor"},
    "flwr.supernode.fleet_http_connection": {"http_request_response"},
}


def from_flower(path):
    """What a module takes from Flower, by the module there."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "flwr":
            found.setdefault(node.module, set()).update(alias.name for alias in node.names)
        assert not (isinstance(node, ast.Import) and any("flwr" in alias.name for alias in node.names)), path
    return found


def test_what_is_taken_from_the_inside_of_flower_stands_in_one_file_and_here():
    """The next version of Flower may move it: compare, then change ``NEEDED`` of processes.py and the extra."""
    for path in DEPLOY.glob("*.py"):
        inside = {module: names for module, names in from_flower(path).items() if module not in PUBLIC}
        assert inside == (INSIDE if path.name == "internals.py" else {}), path
    extras = tomllib.loads((DEPLOY.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (flower,) = (one for one in extras["optional-dependencies"]["flower"] if one.startswith("flwr"))
    assert flower == f"flwr>={processes.NEEDED},<1.43"


def test_no_torch_is_imported_to_refuse_a_command():
    """The ClientApp of a stock SuperNode is imported for each message too."""
    before = "import sys; import fedsparse.deploy.verbs, fedsparse.deploy.joining, fedsparse.deploy.node; "
    done = subprocess.run([sys.executable, "-c", before + "print(*sys.modules)"], capture_output=True, text=True)
    assert "fedsparse.deploy.verbs" in done.stdout.split()
    assert not {"torch", "lightning", "flwr", "cryptography"} & set(done.stdout.split())


@pytest.mark.slow
def test_what_a_process_has_started_is_ended_with_it(tmp_path):
    """A shell's child in the background, which nobody waits for, is in a session of its own."""
    line = "setsid sleep 100 & echo $! > pid; sleep 100"
    with processes.started(["sh", "-c", f"cd {tmp_path}; {line}"], tmp_path, tmp_path / "log") as process:
        assert processes.waited(lambda: (tmp_path / "pid").is_file() and len(processes.below(process.pid)) == 2, 20)
        pids = [process.pid, *processes.below(process.pid)]
        assert all(map(processes.alive, pids))
    assert not any(map(processes.alive, pids))
    assert processes.waited(lambda: True, 0)
    assert not processes.waited(lambda: False, 0)
