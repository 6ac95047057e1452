"""Lay out the workloads' models as Fairlead model repositories (base environment).

models/repository         as users have it
models/repository-thread  every batch in a thread, never in the event loop: what `execution: auto` buys
"""

import shutil

from models import MODELS

ARTEFACTS = {
    "w1": ("xgb.ubj", "model.ubj"),
    "w2": ("xgb.onnx", "model.onnx"),
    "w3": ("identity.onnx", "model.onnx"),
    "w4": ("cnn.onnx", "model.onnx"),
}
SPECS = {
    "repository": "instances: {threads: 1}\n",
    "repository-thread": "instances: {threads: 1, execution: thread}\n",
}
"""One intra-op thread, as every other server here."""

if __name__ == "__main__":
    for repository, spec in SPECS.items():
        for workload, (source, target) in ARTEFACTS.items():
            folder = MODELS / repository / workload
            (folder / "1").mkdir(parents=True, exist_ok=True)
            shutil.copy(MODELS / source, folder / "1" / target)
            (folder / "model.yaml").write_text(spec)
