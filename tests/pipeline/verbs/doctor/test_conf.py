"""What `doctor` sees of a conf's cluster on this machine."""

import subprocess
import sys

from pipeline.verbs.doctor.conf import rays_here


def test_rays_of_this_machine_are_found_by_their_processes():
    address = "127.0.0.1:9"
    words = ["/opt/ray/raylet", "-c", "input()", f"--gcs-address={address}"]
    with subprocess.Popen(words, executable=sys.executable, stdin=subprocess.PIPE) as process:
        assert address in rays_here()
        process.communicate(b"\n")
    assert address not in rays_here()
