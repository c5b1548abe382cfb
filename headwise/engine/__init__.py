import os

# GNU OpenMP's threads spin between operators; beside another process on the same cores they spin while it runs, and decode
# falls from 240 to 3 tok/s. A short spin costs nothing on an idle machine. Read when torch loads, so it is set before.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
