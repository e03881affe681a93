"""`python -m tests.bench.picture_server FOLDER`: gives its files out in turn, until its standard input ends."""

import sys
from pathlib import Path

from datasets.sources import loopback

if __name__ == "__main__":
    bodies = [file.read_bytes() for file in sorted(Path(sys.argv[1]).iterdir())]
    with loopback.serve(lambda path: bodies[int(path) % len(bodies)]) as (_, port):
        print(port, flush=True)
        sys.stdin.read()
