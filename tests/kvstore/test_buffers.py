import resource
import subprocess
import sys

PAGES = 2**20 // resource.getpagesize()  # of one buffer
ROUNDS = 100
CODE = f"""
import resource
from kvstore.buffers import keep_buffers
keep_buffers()
keep_buffers()
def use():
    for _ in range({ROUNDS}):
        several = [bytearray(b"x") * 2**20 for _ in range(4)]
        del several
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_freed_buffers_need_no_new_pages() -> None:
    out = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=60, check=True)
    assert int(out.stdout) < ROUNDS * PAGES / 10, "without it: every page of every buffer"
