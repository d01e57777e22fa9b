"""What must work without PyTorch: a fresh interpreter shows what each command pulls in."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "module",
    [
        "ranker.cli.commands", "ranker.network.variants", "ranker.data.movielens", "ranker.data.atomic.recbole",
        "ranker.data.features", "ranker.training.examples", "ranker.baselines.score",
        "ranker.evaluation.evaluate", "ranker.evaluation.tables", "ranker.embedding.users.carried",
        "ranker.counterfactual.evaluate", "ranker.counterfactual.tables", "ranker.counterfactual.chosen_policy",
    ],
)  # fmt: skip
def test_reading_data_and_evaluating_import_no_training_library(module: str) -> None:
    heavy = {"torch", "sklearn", "scipy", "onnxscript", "matplotlib", "lightgbm"}
    program = f"import sys, {module}; print(*{heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_commands_show_their_options_without_numerical_libraries() -> None:
    program = "import sys, ranker.cli.commands; print(*{'numpy', 'scipy', 'pyarrow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
