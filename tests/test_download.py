"""Downloads from a server that misbehaves.   python -m pytest tests/test_download.py -q"""

import hashlib
import http.server
import sys
import threading

import numpy as np
import pytest

from data import corpus as corpora
from data import download as D
from data import text as texts
from data.files import UserError
from data.tokenizer import Tokenizer
from tests.helpers import packed_zip

DATA = bytes(range(256)) * 2000
SHA = hashlib.sha256(DATA).hexdigest()


class Server(http.server.BaseHTTPRequestHandler):
    """/cut (half, then closed), /short, /long, /page, /wrong, /403, /404, /moved, /stall, /norange;
    anything else is DATA; or, where there are server.files {name: bytes}, only these."""

    seen = []

    def do_GET(self):
        what, wanted = self.path[1:], self.headers.get("Range")
        self.seen.append((what, wanted, self.headers["User-Agent"]))
        if what.isdigit():
            return self.send_error(int(what))
        if what == "moved":
            self.send_response(302)
            self.send_header("Location", "/good")
            return self.end_headers()
        body = {"short": DATA[:-5], "long": DATA + b"x", "wrong": DATA[::-1],
                "page": b"log in..."}.get(what, DATA)
        if self.server.files is not None:
            body = self.server.files.get(what)
            if body is None:
                return self.send_error(404)
        first = int(wanted[6:-1]) if wanted and what not in ("norange", "wrong") else 0
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        if what not in ("long", "short"):  # those do not even say how long they are
            self.send_header("Content-Length", str(len(body) - first))
        self.end_headers()
        body = body[first:]
        try:
            self.wfile.write(body[:len(body) // 2] if what in ("cut", "stall") else body)
        except ConnectionError:  # the client has seen enough
            return
        if what == "stall":
            self.wfile.flush()
            self.server.waiting.wait(20)

    def log_message(self, *_):
        pass


def serve(files=None):
    """Yield a running server, .url is its address and .seen what was asked; then stop it."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.waiting, server.files, server.seen = threading.Event(), files, Server.seen
    server.url = f"http://127.0.0.1:{server.server_port}/"
    Server.seen.clear()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.waiting.set()
    server.shutdown()
    server.server_close()


@pytest.fixture()
def server():
    for running in serve():
        yield running.url


def get(target, *urls):
    return D.download(list(urls), len(DATA), SHA, target)


def test_a_file_arrives_whole_and_is_not_fetched_twice(server, tmp_path, capsys):
    target = tmp_path / "a folder" / "file.zip"
    get(target, server + "good")
    assert target.read_bytes() == DATA and Server.seen[0][2] == D.AGENT
    out = capsys.readouterr().out
    assert server + "good" in out and "0.5 MB" in out
    get(target, server + "good")
    assert len(Server.seen) == 1
    target.write_bytes(DATA[::-1])
    get(target, server + "good")
    assert target.read_bytes() == DATA and len(Server.seen) == 2
    target.write_bytes(b"by hand")
    with pytest.raises(UserError, match="file.zip is another file"):
        get(target, server + "404")


def test_what_was_cut_is_resumed(server, tmp_path):
    target = tmp_path / "file.zip"
    with pytest.raises(UserError, match="goes on where it stopped"):
        get(target, server + "cut")
    assert not target.exists() and (tmp_path / "file.zip.part").stat().st_size == len(DATA) // 2
    get(target, server + "good")
    assert target.read_bytes() == DATA
    assert Server.seen[-1][1] == f"bytes={len(DATA) // 2}-"


def test_where_a_part_is_of_no_use_it_begins_again(server, tmp_path):
    target = tmp_path / "file.zip"
    for what, rubbish in (("norange", b"rubbish"), ("good", DATA + b"too much")):
        (tmp_path / "file.zip.part").write_bytes(rubbish)
        get(target, server + what)
        assert target.read_bytes() == DATA
        target.unlink()


@pytest.mark.parametrize("what, reason", [
    ("403", "HTTP Error 403: Forbidden"), ("404", "HTTP Error 404"), ("wrong", "wrong checksum"),
    ("short", "cut off after 511995 of 512000"), ("long", "more than the expected 512000"),
    ("page", "9 bytes where 512000 were expected"), ("cut", "goes on where it stopped"),
    ("stall", "timed out"), ("http://127.0.0.1:9/", "refused"),  # where nobody listens
])
def test_what_is_not_whole_is_never_taken_for_it(what, reason, server, tmp_path, monkeypatch):
    monkeypatch.setattr(D, "TIMEOUT", 0.3)
    target = tmp_path / "file.zip"
    url = what if "/" in what else server + what
    with pytest.raises(UserError, match=reason) as error:
        get(target, url)
    assert not target.exists() and f"({url}: " in str(error.value)
    assert f"put the file at {target} by hand (sha256 {SHA})" in str(error.value)
    get(target, url, server + "moved")  # the next mirror, and a redirect
    assert target.read_bytes() == DATA


def test_undo_tokens():
    for line, plain in (
        ("In 1 @,@ 000 A.D. , the well @-@ known ( 1 @.@ 5 m ) : \" I do n't ; it 's 5 % \" .",
         "In 1,000 A.D., the well-known (1.5 m): \"I don't; it's 5%\"."),
        ("usually , he would be tearing around !", "usually, he would be tearing around!"),
    ):
        assert texts.undo_tokens(line) == plain


def wikitext(articles, seed):
    rng = np.random.default_rng(seed)
    text = ""
    for i in range(articles):
        text += f" \n = Article {i} = \n \n"
        for section in range(2):
            words = [a + b for a in "bdfgkl" for b in "aeiou"]
            text += f" {' '.join(rng.choice(words, 60))} , a well @-@ known one . \n \n"
            text += f" = = Section {section} = = \n \n"
    return text.encode()


def test_wikitext_by_name(server, tmp_path, monkeypatch):
    """Articles are documents, headings are dropped, and the archive's own files are the split."""
    data = packed_zip({
        f"wikitext-2-raw/wiki.{split}.raw": wikitext(articles, articles)
        for split, articles in (("train", 80), ("valid", 5), ("test", 5))})
    monkeypatch.setattr(sys.modules[__name__], "DATA", data)
    monkeypatch.setitem(D.NAMED, "wikitext2", dict(
        urls=[server + "small.zip"], size=len(data), sha256=hashlib.sha256(data).hexdigest()))
    folder = corpora.prepare("wikitext2", 320, tmp_path / "cache")
    archive = tmp_path / "cache" / "downloads" / "small.zip"
    documents = list(texts.read_documents([archive], "wikitext2"))
    assert [split for split, _ in documents] == ["train"] * 80 + ["valid"] * 5
    assert all(len(d) == 2 and "well-known one." in d[0] for _, d in documents)
    assert not any("=" in p for _, d in documents for p in d)
    tokenizer = Tokenizer(folder / "tokenizer.model")
    valid = np.fromfile(folder / "valid.bin", np.uint16)
    expected = sum((tokenizer.encode(p) for s, d in documents if s == "valid" for p in d), [])
    assert [t for t in valid.tolist() if t > 4] == expected
