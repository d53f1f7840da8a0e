"""Build description of lcf-fast. Metadata lives here; tool settings live in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def version() -> str:
    """The one version number: `__version__` in lcf_fast/__init__.py, read without importing torch."""
    source = (ROOT / "lcf_fast" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if match is None:
        raise RuntimeError('lcf_fast/__init__.py holds no line __version__ = "..."')
    return match.group(1)


HF = ["transformers>=5,<6"]
PLOT = ["matplotlib>=3.8", "scipy>=1.11"]  # scipy: the demo's intervals and tests
TRAIN = ["datasets>=4", "tensorboard>=2.16"]
EVAL = ["scipy>=1.15", "datasets>=4", *PLOT]
BENCH = ["pytest>=8", "pytest-benchmark>=5", *PLOT]
TEST = [
    "pytest>=8",
    "pytest-xdist>=3.5",
    "hypothesis>=6.100",
    "pytest-benchmark>=5",
    *EVAL,
    "ruff",
    "mypy",
    "build>=1.2",
    "setuptools>=77",
    "wheel",
]

setup(
    name="lcf-fast",
    version=version(),
    description="Latent Cache Flow in fused Triton kernels: model-to-model communication through KV caches",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10,<3.14",
    # The Triton code lies in ./kernels and installs as lcf_fast.kernels. It must never become a top-level
    # `kernels`: that is the import name of the Hugging Face library that transformers itself imports.
    # bench/ and tests/ run from a checkout and are not installed.
    packages=[*find_packages(include=["lcf_fast", "lcf_fast.*"]), "lcf_fast.kernels"],
    package_dir={"lcf_fast.kernels": "kernels"},
    package_data={"lcf_fast": ["py.typed"]},
    install_requires=[
        "torch>=2.11",
        'triton>=3.6; platform_system == "Linux"',
        "numpy",
        "safetensors>=0.4.3",
        "rich>=13",
    ],
    extras_require={
        "hf": HF,
        "bench": [*BENCH, *HF],
        "flash": ["flash-attn"],
        "plot": PLOT,
        "train": [*TRAIN, *HF],
        "eval": [*EVAL, *HF],
        "test": TEST,
    },
    entry_points={"console_scripts": ["lcf-fast = lcf_fast.cli:main"]},
    zip_safe=False,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
