"""Train a small model and lay it out as `fairlead models add` and `fairlead models validate` want it.

python train.py build        # build/tumour/model.yaml, build/tumour/1/model.ubj, build/tumour/checks/
"""

import shutil
import sys
from pathlib import Path

import numpy as np
import xgboost
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split

HELD_OUT = 0.3
SETTINGS = {"objective": "binary:logistic", "max_depth": 4, "eta": 0.1, "nthread": 1, "seed": 7}


def main(build: Path) -> None:
    data = load_breast_cancer()
    x, x_out, y, y_out = train_test_split(
        data.data.astype(np.float32), data.target, test_size=HELD_OUT, random_state=7, stratify=data.target
    )
    model = xgboost.train(SETTINGS, xgboost.DMatrix(x, y), num_boost_round=100)

    folder = build / "tumour"
    (folder / "1").mkdir(parents=True, exist_ok=True)
    model.save_model(folder / "1" / "model.ubj")
    shutil.copy(Path(__file__).with_name("model.yaml"), folder / "model.yaml")

    checks = folder / "checks"
    checks.mkdir(exist_ok=True)
    shutil.copy(Path(__file__).with_name("checks.yaml"), checks / "checks.yaml")
    np.savez(checks / "dataset.npz", input=x_out, labels=y_out)
    right = np.mean((model.predict(xgboost.DMatrix(x_out)) > 0.5) == y_out)
    print(f"{folder}: {right:.1%} of {len(y_out)} held-out rows are right")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
