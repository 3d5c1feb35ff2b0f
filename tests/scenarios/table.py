"""The fault scenarios that a client, a store and a registry have to stand, and their tests.

Each has a number, and its tests the mark `scenario(number)`. Some are tested at several levels: the
part in question alone, the whole command, a real peer.
"""

from __future__ import annotations

from typing import Final

#: What happens and what has to come of it, by number.
SCENARIOS: Final = {
    1: "kill -9 at 60 % of a pull: the next one fetches the rest, and nothing showed before",
    2: "twenty cuts at random bytes: one command succeeds while there is progress",
    3: "a body shorter than its descriptor, with a length that agrees: a size error",
    4: "one flipped bit: fetched once more, then a digest error, nothing left",
    5: "a server that ignores Range on resume: from the start, and correct",
    6: "206 with another start: rejected, from the start",
    7: "a manifest that is not its digest: refused before any blob is asked for",
    8: "Docker-Content-Digest that is not the body's: refused",
    9: "a Content-Type that is not the body's mediaType: refused, both are named",
    10: "a token that ends during a push: renewed, the push completes",
    11: "a token that allows less than is needed: another is asked for",
    12: "403 DENIED: told at once, not tried again",
    13: "429 with Retry-After, in seconds or as a date: waited for",
    14: "503 for all tries: an end in bounded time, exit code 6",
    15: "a wrong password: told at once with host and source, the secret is not shown",
    16: "blobs on another host: fetched there without Authorization",
    17: "an upload Location on another host: sent there without Authorization",
    18: "a redirect from https to http, or more than ten: refused",
    19: "a disk that runs full during a pull: need and have, the part kept, the index unchanged",
    20: "two processes pull one model: one download, one copy, both end well",
    21: "eight processes tag at once: all tags are there, index.json is always JSON",
    22: "a collection while a pull runs: nothing that the pull needs is removed",
    23: "paths that lead out of the target: refused",
    24: "links and devices planted in the target or in an archive: refused, nothing outside",
    25: "a small archive that expands without end: stopped at the limit",
    26: "a manifest of 50 MB, or nested 100,000 deep: refused, memory stays flat",
    27: "digests that are none: refused before a path or a URL is made of them",
    28: "a blob of 8 GB: constant memory, one PUT, nothing the second time, mounts",
    29: "a chunked upload cut in its third chunk: goes on from the status",
    30: "a source that changes while it is packaged or pushed: refused, no manifest",
    31: "a server that never answers, or drips: an error, not a hang",
    32: "a subject, and a registry without referrers: the fallback tag, kept once",
    33: "our layout in skopeo, umoci and oras, theirs in ours",
    34: "the registry under the specification's conformance checks: none fails",
    35: "Ctrl-C during a push: the upload is cancelled, exit code 130, the tag unchanged",
}
