"""Fetch a file whose size and sha256 are known: resumed where it stopped, never half there.

Nothing here trusts a server. A file appears under its name only when it is whole and has its
checksum; until then it is NAME.part, which the next try continues.
"""

import http.client
import os
import urllib.request

from data.files import UserError, lock_folder, progress, sha256_file

TIMEOUT = 30  # seconds without a byte
AGENT = "entropy-aware-masking/1.0"  # one mirror refuses Python's default user agent

# Sizes and checksums as recorded by the Hugging Face datasets library.
NAMED = {
    "wikitext2": dict(
        urls=["https://wikitext.smerity.com/wikitext-2-raw-v1.zip",
              "https://huggingface.co/datasets/ggml-org/ci/resolve/main/wikitext-2-raw-v1.zip",
              "https://s3.amazonaws.com/research.metamind.io/wikitext/wikitext-2-raw-v1.zip"],
        size=4721645, sha256="ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11"),
    "wikitext103": dict(
        urls=["https://wikitext.smerity.com/wikitext-103-raw-v1.zip",
              "https://s3.amazonaws.com/research.metamind.io/wikitext/wikitext-103-raw-v1.zip"],
        size=191984949, sha256="91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794"),
}


def download(urls, size, sha256, target):
    """Make sure that `target` holds the file of `size` bytes with this sha256.

    urls: mirrors, tried in order. UserError, saying what to put where, if none of them gives it.
    """
    if is_whole(target, size, sha256):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part, reasons = target.with_name(target.name + ".part"), []
    if target.exists():
        reasons.append(f"{target} is another file")
    with lock_folder(target.parent, wait=f"it downloads {target.name}"):
        if is_whole(target, size, sha256):  # it came while we waited
            return target
        for url in urls:
            print(f"downloading {url} ({size / 1e6:.1f} MB)", flush=True)
            try:
                fetch(url, size, part)
                if sha256_file(part) == sha256:
                    os.replace(part, target)
                    return target
                part.unlink()
                reasons.append(f"{url}: wrong checksum")
            except (OSError, http.client.HTTPException) as error:  # urllib's are OSErrors
                reasons.append(f"{url}: {str(error).strip('<>') or 'cut off'}")
            print(f"  that did not work: {reasons[-1]}", flush=True)
    raise UserError(f"could not download {target.name} ({'; '.join(reasons)}): try again, it goes "
                    f"on where it stopped, or put the file at {target} by hand (sha256 {sha256})")


def is_whole(path, size, sha256):
    """Is the file there, and not another one?"""
    return path.exists() and path.stat().st_size == size and sha256_file(path) == sha256


def fetch(url, size, part):
    """Append what is missing of `url` to `part`. OSError or HTTPException if that fails."""
    have = part.stat().st_size if part.exists() else 0
    if have == size:
        return
    if have > size:
        have = 0
    request = urllib.request.Request(url, headers={"User-Agent": AGENT, "Range": f"bytes={have}-"})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        if not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            have = 0  # the server sends all of it: begin again
        length = answer.headers.get("Content-Length")
        if length and have + int(length) != size:
            raise OSError(f"{have + int(length)} bytes where {size} were expected")
        bar = progress(total=size, initial=have, unit="B")
        with bar, open(part, "ab" if have else "wb") as f:
            while have <= size and (piece := answer.read(1 << 16)):
                have += len(piece)
                f.write(piece)
                bar.update(len(piece))
            f.flush()
            os.fsync(f.fileno())
    if have != size:
        raise OSError(f"cut off after {have} of {size} bytes" if have < size else
                      f"more than the expected {size} bytes")
