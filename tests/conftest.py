"""What holds for every test."""

import os

# One thread a process, set before torch is imported, also in the commands that tests start: networks this
# small lose far more by waiting for threads than they gain, and two processes of tests share two cores.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
