import os
import shutil

from hypothesis import settings

# Tests never assert on times, hypothesis' own included.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# Before torch is imported: the models are tiny, and with pytest-xdist each worker has one core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Before Triton is imported: without an NVIDIA GPU its interpreter runs the kernels, on the CPU.
if not shutil.which("nvidia-smi"):
    os.environ.setdefault("TRITON_INTERPRET", "1")
