"""Packaging. torch, TorchRec and FBGEMM are installed by launch/stack.py, which alone says which versions go together.

`pip install` brings what prepares logs; what trains comes by `syncrec stack install`. Pip by itself would bring torch with
CUDA's libraries on every machine, and FBGEMM in a build that does not load beside a torch for CPU.
"""

import re
import runpy
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$',
    (ROOT / "trainer/__init__.py").read_text(encoding="utf-8"),
    re.M,
)[1]
STACK = runpy.run_path(str(Path(__file__).with_name("launch") / "stack.py"))
torch, torchrec, fbgemm = STACK["MATCHING"][STACK["PINNED"]]
# mapInArrow, which takes Arrow batches to Python, asks for pandas; PySpark does not know pandas 3 yet.
# What trains and computes. TorchRec comes without its dependencies (launch/stack.py): those beside FBGEMM stand here.
TRAIN = [
    f"torch{STACK['torch_bounds']()}",
    "deepspeed>=0.19",  # ZeRO around the dense model, the launcher
    "tensordict",
    "torchmetrics==1.0.3",
    "pyre-extensions",
    "tqdm",
]
SPARK = ["pyspark>=3.5", "pandas>=2.2,<3"]

setup(
    name="syncrec-trainer",
    version=VERSION,
    description="Distributed training of SyNCRec, a cross-domain sequential recommender, on TorchRec and DeepSpeed",
    long_description=Path(__file__)
    .with_name("README.md")
    .read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    entry_points={"console_scripts": ["syncrec = launch.cli:main"]},
    packages=find_packages(
        include=[
            "trainer*",
            "syncrec*",
            "embeddings*",
            "syncrec_kernels*",
            "launch*",
        ]
    ),
    package_data={
        "launch": ["configs/*.yaml", "templates/*"],
        "trainer": ["py.typed"],
        "trainer.reporting": ["assets/*"],
        "syncrec": ["py.typed"],
        "embeddings": ["py.typed"],
        "syncrec_kernels": ["*.cpp", "*.h"],
    },
    install_requires=[
        "webdataset>=1.0",  # shards
        "numpy>=2.0",
        "duckdb>=1.5",  # prepare: an out-of-core engine for Parquet, CSV and TSV
        "pyarrow>=18",  # Parquet written in streams; DuckDB's results in batches
        "safetensors>=0.5",  # weights on disk, without pickle
        "xxhash>=3.4",  # checksums of checkpoint files, faster than any disk
        "pyyaml>=6",  # a run's own YAML, looked at before OmegaConf loads it
        "omegaconf>=2.4",  # YAML and key=value into dataclasses
        "rich>=13",  # progress, tables
        "tensorboard>=2.18",  # the metrics display that people already run
        "plotly>=6",  # the report's plots
        "jinja2>=3.1",  # the report's page
    ],
    extras_require={
        "test": [
            "pytest>=8",
            "pytest-timeout",
            "pytest-xdist>=3.6",  # two files of tests at a time
            "hypothesis>=6.100",
            "ruff",
            "mypy>=1.13",  # types
            "types-PyYAML",
            "nbclient>=0.10",  # runs the notebook of examples/
            "ipykernel>=6",
            "ipywidgets>=8",
            # PySpark wants Java 17: CI compares the two engines byte for byte; without it those tests are skipped.
            *SPARK,
        ],
        "train": TRAIN,
        "spark": SPARK,
        "notebook": [
            "ipywidgets>=8",
            "pandas>=2.2",
        ],  # progress bars and DataFrames in Jupyter
        "index": [
            "faiss-cpu>=1.9"
        ],  # FAISS: an approximate index in an export, and the peer of benchmarks/ranking.py
        # Schemas of Kubernetes' versions for tests/unit/launch/test_templates.py; 108 MB, so not in `test`.
        "kubernetes": ["kubernetes-validate>=1.33"],
        # log.trackers. MLflow's client alone: a local store (sqlite) and `mlflow ui` come with mlflow itself.
        "mlflow": ["mlflow-skinny>=2.20"],
        "wandb": ["wandb>=0.31"],  # before, login() asks on the terminal
        # What the benchmarks' peers need stands in benchmarks/peers.txt: RecBole cannot share an environment with NumPy 2.
        # On a CUDA machine plain pip does the same as launch/stack.py.
        "cuda": [
            *TRAIN,
            f"torch=={torch}",
            f"torchrec=={torchrec}",
            f"fbgemm-gpu=={fbgemm}",
        ],
    },
)
