"""Downloads against a small server on loopback that can cut off, lie and fail."""

import hashlib
import http.server
import os
import socket
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

from readers import download
from readers.download import Archive, fetch, unpack
from support.errors import UserError

CONTENT = bytes(range(256)) * 2000  # 512,000 bytes
MD5 = hashlib.md5(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` at every path but /missing; `cuts` are the bytes sent per answer."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.cuts, self.ranges = CONTENT, [], True
        self.requests: list[tuple[str, str | None]] = []  # path, Range

    def url(self, path: str = "/file.bin") -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        wanted = self.headers.get("Range")
        self.server.requests.append((self.path, wanted))
        if self.path == "/missing":
            self.send_error(404)
            return
        content = b"<html>log in first</html>" if self.path == "/wrong" else self.server.content
        start = 0
        if wanted and self.server.ranges:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
        else:
            self.send_response(200)
        body = content[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.server.cuts.pop(0)] if self.server.cuts else body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def dead_url(monkeypatch) -> str:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/file.bin"


def archive(*urls: str) -> Archive:
    return Archive("file.bin", urls, MD5)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_good_download(server, tmp_path):
    path = fetch(archive(server.url()), tmp_path / "new" / "folder")
    assert path.read_bytes() == CONTENT
    assert names(path.parent) == ["file.bin"]
    fetch(archive(server.url()), path.parent)
    assert len(server.requests) == 1, "asked again for what was there"


def test_two_jobs_do_not_download_the_same_file_at_once(server, tmp_path):
    code = (
        "import sys; from pathlib import Path; from support.lock import held\n"
        "with held(Path(sys.argv[1]), 'it'): print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / ".file.bin.lock"], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert other.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"file.bin: another process .{other.pid} on"):
        fetch(archive(server.url()), tmp_path)
    other.communicate("")
    assert fetch(archive(server.url()), tmp_path).read_bytes() == CONTENT


def test_cut_off_half_way_and_resumed_at_once(server, tmp_path):
    server.cuts = [256_000]
    assert fetch(archive(server.url()), tmp_path).read_bytes() == CONTENT
    assert [wanted for _, wanted in server.requests] == [None, "bytes=256000-"]


def test_cut_off_and_resumed_by_the_next_run(server, tmp_path):
    server.cuts = [256_000, 0]
    with pytest.raises(UserError, match="cut off after 256000 of 512000 bytes"):
        fetch(archive(server.url()), tmp_path)
    assert names(tmp_path) == ["file.bin.part"]
    assert fetch(archive(server.url()), tmp_path).read_bytes() == CONTENT
    assert server.requests[-1][1] == "bytes=256000-"
    assert names(tmp_path) == ["file.bin"]


def test_the_next_mirror_continues_what_the_first_began(server, tmp_path):
    server.cuts = [256_000, 0]
    urls = server.url("/first"), server.url("/second")
    assert fetch(archive(*urls), tmp_path).read_bytes() == CONTENT
    assert server.requests[-1] == ("/second", "bytes=256000-")


def test_a_server_that_knows_no_ranges_starts_over(server, tmp_path):
    server.ranges = False
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:1000])
    assert fetch(archive(server.url()), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("part", [b"of another file", CONTENT + b"x", CONTENT])
def test_a_part_that_is_foreign_too_long_or_whole(server, tmp_path, part):
    (tmp_path / "file.bin.part").write_bytes(part)
    assert fetch(archive(server.url()), tmp_path).read_bytes() == CONTENT
    assert names(tmp_path) == ["file.bin"]


def test_wrong_content_is_never_kept(server, tmp_path):
    with pytest.raises(UserError, match="sent another file"):
        fetch(archive(server.url("/wrong")), tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize("first", ["/wrong", "/missing"])
def test_the_second_address_where_the_first_fails(server, tmp_path, first):
    assert fetch(archive(server.url(first), server.url()), tmp_path).read_bytes() == CONTENT


def test_not_found(server, tmp_path):
    with pytest.raises(UserError, match="HTTP 404") as error:
        fetch(archive(server.url("/missing")), tmp_path)
    assert f"Get it from {server.url('/missing')}" in str(error.value)
    assert f"put it at {tmp_path / 'file.bin'}" in str(error.value)


def test_nothing_listens(dead_url, tmp_path):
    with pytest.raises(UserError, match=r"127\.0\.0\.1:\d+: Connection refused"):
        fetch(archive(dead_url), tmp_path)


def test_a_server_that_falls_silent(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/file.bin"
        with pytest.raises(UserError, match="timed out"):
            fetch(archive(url), tmp_path)


def test_a_file_put_there_by_hand_needs_no_network(dead_url, tmp_path):
    (tmp_path / "file.bin").write_bytes(CONTENT)
    assert fetch(archive(dead_url), tmp_path) == tmp_path / "file.bin"


def test_another_file_of_that_name_is_refused_and_left_alone(server, tmp_path):
    (tmp_path / "file.bin").write_bytes(CONTENT[:-1])
    with pytest.raises(UserError, match=r"file\.bin: not the original file"):
        fetch(archive(server.url()), tmp_path)
    assert (tmp_path / "file.bin").read_bytes() == CONTENT[:-1]
    assert server.requests == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_folder_in_the_place_of_the_file_is_named(server, tmp_path):
    (tmp_path / "file.bin").mkdir()
    with pytest.raises(UserError, match=r"file\.bin: cannot be read \(Is a directory\)"):
        fetch(archive(server.url()), tmp_path)


def test_a_full_disk(server, tmp_path):
    (tmp_path / "file.bin.part").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"cannot save .*: No space left"):
        fetch(archive(server.url()), tmp_path)


def make_archive(folder: Path, suffix: str) -> Path:
    (folder / "top" / "inner").mkdir(parents=True)
    (folder / "top" / "inner" / "a.txt").write_text("a")
    path = folder / f"top{suffix}"
    if suffix == ".zip":
        with zipfile.ZipFile(path, "w") as file:
            file.write(folder / "top" / "inner" / "a.txt", "top/inner/a.txt")
    else:
        with tarfile.open(path, "w:gz") as file:
            file.add(folder / "top", "top")
    return path


@pytest.mark.parametrize("suffix", [".zip", ".tar.gz"])
def test_unpacking(tmp_path, suffix):
    path = make_archive(tmp_path / "made", suffix)
    unpack(path, tmp_path / "top")
    assert (tmp_path / "top" / "inner" / "a.txt").read_text() == "a"
    assert names(tmp_path) == ["made", "top"]


def test_an_interrupted_unpacking_leaves_no_folder(tmp_path, monkeypatch):
    path = make_archive(tmp_path / "made", ".zip")

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(download.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        unpack(path, tmp_path / "top")
    assert names(tmp_path) == ["made"]
