"""Lay out the workloads' models as a Fairlead model repository: models/repository (base environment)."""

import shutil

from models import MODELS

ARTEFACTS = {
    "w1": ("xgb.ubj", "model.ubj"),
    "w2": ("xgb.onnx", "model.onnx"),
    "w3": ("identity.onnx", "model.onnx"),
    "w4": ("cnn.onnx", "model.onnx"),
}
ONE_THREAD = "instances: {threads: 1}\n"
"""As every other server here."""

if __name__ == "__main__":
    for workload, (source, target) in ARTEFACTS.items():
        folder = MODELS / "repository" / workload
        (folder / "1").mkdir(parents=True, exist_ok=True)
        shutil.copy(MODELS / source, folder / "1" / target)
        (folder / "model.yaml").write_text(ONE_THREAD)
