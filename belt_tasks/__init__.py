"""The stages of belt as plain functions: a reference and a spec in, a receipt out."""

import os

# before PyTorch is imported: its threads wait for each other by spinning, which beside another fine-tuning on the same
# cores took nine tenths of the speed and more; after so many spins they sleep, which on idle cores costs a few percent
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
